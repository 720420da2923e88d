# SPDX-License-Identifier: Apache-2.0
"""What an engine makes of a peer process that does not answer: one whose interpreter is busy lives."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from sage_kv_connector.backends import host_backends
from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.engine.core import EngineCore
from sage_kv_connector.engine.session.questions import Question, Reply
from tests.engine.memory_backend import MemoryBackend
from tests.engine.paged_side import eventually
from tests.engine.test_questions import address

TIMEOUT_S = 0.5
PATIENCE_S = 10.0
#: Answers "busy" after it let no Python run for so many seconds, and "never" not at all.
CHILD = """
import json, sys
from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.engine.core import EngineCore
from tests.backends.peer import hold_interpreter
def busy(question, body):
    hold_interpreter(float(body))
    question.answer(body)
core = EngineCore(KVTransportConfig(backend=sys.argv[1], host="127.0.0.1"))
core.serve("busy", busy)
core.serve("never", lambda question, body: None)
core.start()
print(json.dumps([core.engine_id, core.addresses]), flush=True)
sys.stdin.read()
core.close()
"""


class Asked(NamedTuple):
    process: subprocess.Popen[str]
    peer: PeerAddress


@contextmanager
def asked_process(backend: str) -> Iterator[Asked]:
    command = [sys.executable, "-c", CHILD, backend]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        engine_id, addresses = json.loads(process.stdout.readline())
        yield Asked(process, PeerAddress(engine_id, 0, tuple(addresses)))
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(params=host_backends())
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def asked(backend: str) -> Iterator[Asked]:
    with asked_process(backend) as made:
        yield made


@pytest.fixture
def core(backend: str) -> Iterator[EngineCore]:
    made = EngineCore(KVTransportConfig(backend=backend, host="127.0.0.1", peer_timeout_s=TIMEOUT_S))
    made.start(listen=False)
    yield made
    made.close()


def _ask(core: EngineCore, peer: PeerAddress, verb: str, body: bytes = b"") -> queue.Queue[Reply]:
    replies: queue.Queue[Reply] = queue.Queue()
    core.ask(peer, verb, body, replies.put, PATIENCE_S)
    return replies


def test_a_peer_whose_interpreter_is_busy_is_waited_for(core: EngineCore, asked: Asked) -> None:
    assert _ask(core, asked.peer, "busy", b"0").get(timeout=PATIENCE_S).ok  # the session is open
    reply = _ask(core, asked.peer, "busy", str(4 * TIMEOUT_S).encode()).get(timeout=PATIENCE_S)
    assert reply == Reply("", "", str(4 * TIMEOUT_S).encode())


def test_a_stopped_peer_is_given_up(core: EngineCore, asked: Asked, caplog: pytest.LogCaptureFixture) -> None:
    replies = _ask(core, asked.peer, "never")
    time.sleep(2 * TIMEOUT_S)
    assert replies.empty()
    asked.process.send_signal(signal.SIGSTOP)
    reply = replies.get(timeout=PATIENCE_S)
    assert reply.code == "lost" and f"silent for {TIMEOUT_S} s" in reply.detail
    eventually(lambda: core.counters()["sessions"] == 0)
    assert any("silent" in r.message and r.levelname == "WARNING" for r in caplog.records)


def test_a_session_is_watched_while_somebody_holds_it(make_core: Callable[..., EngineCore]) -> None:
    asker, other = make_core(), make_core()
    waiting: list[Question] = []
    other.serve("later", lambda question, body: waiting.append(question))
    backend = asker.backends["memory"]
    assert isinstance(backend, MemoryBackend)
    replies = [_ask(asker, address(other), "later") for _ in range(2)]
    eventually(lambda: len(waiting) == 2)
    assert len(backend.watched) == 1
    other._loop.submit(waiting[0].answer, b"")
    assert replies[0].get(timeout=PATIENCE_S).ok and len(backend.watched) == 1
    other._loop.submit(waiting[1].answer, b"")
    assert replies[1].get(timeout=PATIENCE_S).ok
    assert not backend.watched
