# SPDX-License-Identifier: Apache-2.0
"""Spans on their way out: nobody waits for them, and without an endpoint they are not there."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from sage_kv_connector.telemetry.recording import spans as spans_module
from sage_kv_connector.telemetry.recording.snapshot import TransferRecord
from sage_kv_connector.telemetry.recording.spans import LOAD, Span, Spans
from tests.engine.paged_side import eventually


def record(name: str) -> TransferRecord:
    return TransferRecord(name, "decode", "p[0]", "tcp", "same", 0, 1, 1, 0.0, 1.0, (("connect", 1.0),))


class Stuck:
    """A sink that takes nothing until it is let go."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.go, self.sent, self.closed = threading.Event(), 0, False

    def keeps(self, trace_id: str) -> bool:
        return True

    def send(self, span: Span) -> None:
        self.begun.set()
        self.go.wait()
        self.sent += 1

    def close(self) -> None:
        self.closed = True


def test_who_puts_never_waits_and_what_is_too_much_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    sink = Stuck()
    spans = Spans(sink, 0)
    for number in range(spans_module.MAX_WAITING + 100):
        spans.put(LOAD, record(str(number)))
    assert 98 <= spans.dropped <= 100
    assert caplog.text.count("spans are dropped") == 1
    sink.go.set()
    spans.close()
    spans.close()
    assert sink.sent == spans_module.MAX_WAITING + 100 - spans.dropped and sink.closed


@pytest.mark.parametrize("waiting", [0, 5000])
def test_an_engine_that_ends_does_not_wait_for_a_dead_collector(
    waiting: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(spans_module, "CLOSE_S", 0.05)
    sink = Stuck()
    spans = Spans(sink, 0)
    spans.put(LOAD, record("first"))
    assert sink.begun.wait(10)
    for number in range(waiting):
        spans.put(LOAD, record(str(number)))
    spans.close()
    assert not sink.closed and "the last spans may be lost" in caplog.text
    sink.go.set()
    eventually(lambda: sink.closed)


def test_without_an_endpoint_the_sdk_is_not_imported() -> None:
    code = (
        "import sys; from sage_kv_connector.config import KVTransportConfig; "
        "from sage_kv_connector.engine import EngineCore; core = EngineCore(KVTransportConfig(backend='shm')); "
        "core.start(); core.close(); print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
