# SPDX-License-Identifier: Apache-2.0
"""vLLM's worker over KV on an (emulated) device: pages are final when the device computed them, and its thread waits
for nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sage_kv_connector.contract.failure import Code
from sage_kv_connector.devices.runtime import DeviceMemory
from sage_kv_connector.engine import EngineCore, TransferAudit
from sage_kv_connector.engine.conversion import staging
from sage_kv_connector.integrations.common.compute_events import ComputeEvents
from tests.engine.conftest import made_cores
from tests.engine.converting_side import ConvertingSide, Shape
from tests.engine.device_side import DeviceSide
from tests.engine.paged_side import eventually
from tests.engine.test_conversion import TOKENS, check, pages_for, write_content
from tests.engine.watched_runtime import Event, Watched
from tests.vendors.rig import H2D, Rig

pytest.importorskip("vllm")

from sage_kv_connector.integrations.vllm.completions import Completions
from sage_kv_connector.integrations.vllm.metadata import Offered, Progress
from sage_kv_connector.integrations.vllm.prefill import PrefillHalf

PAGES = 24
ANY_PROMPT: Any = None
MakeCore = Callable[..., EngineCore]


@pytest.fixture
def make_core() -> Iterator[MakeCore]:
    yield from made_cores(backend="tcp", host="127.0.0.1")


class Prefill(DeviceSide):
    """A worker's prefill half. ``launch`` is a layer's forward pass: bytes that come on the engine's own stream."""

    def __init__(self, make_core: MakeCore, shape: Shape, rig: Rig) -> None:
        self.watched = Watched(rig.runtime)
        super().__init__(make_core, shape, PAGES, rig)
        self.stream = rig.runtime.stream_create(0)
        self.computed = ComputeEvents(lambda: Event(self.watched, self.stream))
        audit = TransferAudit(None, 0)
        self.half = PrefillHalf(self.core, self.view, Completions(), audit, self.computed)
        self.layers = [layer.name for layer in self.view.groups[0].layers]
        self.watched.begin()

    def device(self) -> DeviceMemory:
        runtime: Any = self.watched
        return DeviceMemory(runtime, 0)

    def launch(self, layer: int) -> None:
        pinned = self.rig.pinned(self.cache[layer].nbytes)
        pinned[:] = self.cache[layer].reshape(-1)
        self.rig.runtime.copy_async(
            0, self.tensors[layer].address, pinned.ctypes.data, len(pinned), H2D, self.stream
        )

    def begin(self, pages: list[int]) -> None:
        self.half.begin_step(
            [Offered("r", "t", "t", ANY_PROMPT, False)],
            [Progress("r", "t", (tuple(pages),), TOKENS, True)],
        )


@pytest.fixture(params=["nvidia", "ascend"])
def rig(request: pytest.FixtureRequest) -> Rig:
    return Rig(request.param, memory_bytes=160 << 20)


def test_pages_are_sent_when_the_device_computed_them(make_core: MakeCore, rig: Rig) -> None:
    prefill = Prefill(make_core, Shape(), rig)
    decode = ConvertingSide(make_core, Shape(), PAGES)
    there, here = pages_for(prefill, 1), pages_for(decode, 2)
    content = write_content(prefill, there, range(TOKENS))
    prefill.watched.called.clear()
    prefill.begin(there)
    decode.subscribe(prefill, "t", range(TOKENS), here)
    eventually(lambda: prefill.core.is_streaming("t"))
    rig.control.hold("h2d")  # the engine's stream stands still: nothing is computed yet
    for layer, name in enumerate(prefill.layers):
        prefill.launch(layer)
        prefill.half.layer_saved(name)
    prefill.half.end_forward()
    assert set(prefill.watched.called) == {"event_record"}
    assert not prefill.computed.settle(0.2) and decode.outcomes.empty()
    rig.control.release()
    outcome = decode.outcomes.get(timeout=10)
    assert outcome.ok, outcome.error
    check(prefill, decode, content, here, range(TOKENS), "auto")
    assert prefill.computed.settle(5)
    prefill.half.close()


def test_a_layer_is_sent_while_the_next_one_is_computed(
    make_core: MakeCore, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bound in ("SMALLEST_PART_BYTES", "LARGEST_PART_BYTES"):  # so that layers are parts of their own
        monkeypatch.setattr(staging, bound, 4096)
    prefill = Prefill(make_core, Shape(), rig)
    decode = ConvertingSide(make_core, Shape(), PAGES)
    there, here = pages_for(prefill, 1), pages_for(decode, 2)
    write_content(prefill, there, range(TOKENS))
    prefill.begin(there)
    decode.subscribe(prefill, "t", range(TOKENS), here)
    eventually(lambda: prefill.core.is_streaming("t"))
    prefill.launch(0)
    prefill.half.layer_saved(prefill.layers[0])
    eventually(lambda: prefill.core.counters()["bytes_sent"] > 0)
    assert decode.outcomes.empty()
    for layer in range(1, len(prefill.layers)):
        prefill.launch(layer)
    prefill.half.end_forward()
    assert decode.outcomes.get(timeout=10).ok
    prefill.half.close()


def test_nobody_who_listens_no_event_a_layer(make_core: MakeCore, rig: Rig) -> None:
    prefill = Prefill(make_core, Shape(), rig)
    prefill.begin(pages_for(prefill, 1))
    prefill.watched.called.clear()
    for layer, name in enumerate(prefill.layers):
        prefill.launch(layer)
        prefill.half.layer_saved(name)
    prefill.half.end_forward()
    assert prefill.watched.called == ["event_record"]
    prefill.half.close()


def test_what_a_device_lost_is_told_to_who_waits(make_core: MakeCore, rig: Rig) -> None:
    prefill = Prefill(make_core, Shape(), rig)
    decode = ConvertingSide(make_core, Shape(), PAGES)
    there, here = pages_for(prefill, 1), pages_for(decode, 2)
    prefill.begin(there)
    decode.subscribe(prefill, "t", range(TOKENS), here)
    eventually(lambda: prefill.core.is_streaming("t"))
    rig.control.set(dma_error_after_copies=0)
    prefill.launch(0)
    prefill.half.end_forward()
    outcome = decode.outcomes.get(timeout=10)
    assert outcome.failure is not None and outcome.failure.code == Code.WITHDRAWN, outcome
    assert "prefill's device failed" in outcome.error and prefill.rig.runtime.vendor in outcome.error
    eventually(lambda: prefill.core.counters()["offers"] == 0)
    prefill.half.close()


def test_nothing_becomes_final_once_it_is_closed() -> None:
    class Hangs:
        def __init__(self) -> None:
            self.over = threading.Event()

        def record(self) -> None:
            self.over.clear()

        def synchronize(self) -> None:
            assert self.over.wait(10)

    made: list[Hangs] = []

    def make() -> Hangs:
        made.append(Hangs())
        return made[-1]

    calls: list[str] = []
    computed = ComputeEvents(make)
    computed.behind(lambda: calls.append("first"), calls.append)
    computed.behind(lambda: calls.append("second"), calls.append)
    closing = threading.Thread(target=computed.close)
    closing.start()
    eventually(lambda: computed._closing)
    for event in made:
        event.over.set()
    closing.join(10)
    assert calls == [] and not closing.is_alive()


def test_a_call_that_fails_does_not_end_the_others(caplog: pytest.LogCaptureFixture) -> None:
    class Over:
        def record(self) -> None: ...
        def synchronize(self) -> None: ...

    calls: list[int] = []
    computed = ComputeEvents(Over)

    def fails() -> None:
        raise ValueError("planted")

    computed.behind(fails, lambda _: None)
    computed.behind(lambda: calls.append(1), lambda _: None)
    assert computed.settle(10) and calls == [1] and "planted" in caplog.text
    computed.close()
