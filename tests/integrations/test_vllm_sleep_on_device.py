# SPDX-License-Identifier: Apache-2.0
"""A cache on an (emulated) device that vLLM unmaps and maps again: nothing of ours uses what is not there."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")

from sage_kv_connector.engine.conversion.device_rooms import BUFFERED_PARTS
from sage_kv_connector.engine.conversion.staging import LARGEST_PART_BYTES
from sage_kv_connector.kernels.registry import BY_ADDRESS
from tests.engine.paged_side import eventually
from tests.integrations.vllm_device import DeviceWorker, put_on
from tests.integrations.vllm_layouts import LAYOUTS
from tests.integrations.vllm_workers import PAGE, TOKENS, finished, handed_over, load, offered, progress
from tests.vendors.rig import Rig

Pair = tuple[DeviceWorker, DeviceWorker]


@pytest.fixture(params=["nvidia", "ascend"])
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    rig = Rig(request.param, memory_bytes=256 << 20)
    rig.control.set(virtual_memory=True)  # as vLLM's allocator for sleep has it
    put_on(rig, monkeypatch)
    made = [DeviceWorker(name, seed, "auto", LAYOUTS["LBHNC"], rig) for name, seed in (("p", 1), ("d", 2))]
    yield made[0], made[1]
    rig.control.release()
    for worker in made:
        worker.close()
    rig.control.set(virtual_memory=False)


def sleep(worker: DeviceWorker) -> None:
    """The memory goes, which the emulator refuses while work that uses it is in flight."""
    worker.side.unregister_kv_caches()
    for address in worker.addresses:
        worker.rig.runtime.free(0, address)


def wake_up(worker: DeviceWorker, seed: int) -> None:
    worker.cache.fill(seed)
    worker.map_again()
    worker.side.restore_kv_caches()


def begun(prefill: DeviceWorker, decode: DeviceWorker) -> None:
    """A load whose first page comes, and waits for the device."""
    prefill.step(offers=[offered("t")], progress=[progress("t", (1, 2, 3), PAGE)])
    decode.step(loads=[load(prefill.prefill(), "t", [4, 5, 6], done=False)])
    known = prefill.side._registered
    assert known is not None
    eventually(lambda: known.core.is_streaming("t"))


def test_loads_in_flight_fail_by_name_and_touch_nothing_when_decode_sleeps(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    prefill, decode = pair
    begun(prefill, decode)
    with caplog.at_level(logging.DEBUG, "sage_kv_connector"):
        sleep(decode)
    assert "d-t, transfer t: did not arrive: vLLM discards its KV cache (sleep)" in caplog.text
    prefill.step(progress=[progress("t", (1, 2, 3), TOKENS)])
    sent = prefill.step(finished=[finished("t", (1, 2, 3))])
    results = decode.step(forward=False)
    assert results.failed == {"d-t"} and results.invalid_blocks == {4, 5, 6}
    assert prefill.until(lambda one: bool(one.sent), sent).sent == {"p-t"}
    wake_up(decode, 3)
    assert handed_over(prefill, decode, "after", [1, 2, 3], [7, 2, 5])


def test_sleep_waits_for_what_the_device_does_to_the_memory(pair: Pair) -> None:
    prefill, decode = pair
    control = decode.rig.control
    prefill.step(offers=[offered("t")], progress=[progress("t", (1, 2, 3), TOKENS)])
    prefill.step(finished=[finished("t", (1, 2, 3))])
    before = control.counts()["h2d"].calls
    control.hold("h2d")
    decode.step(loads=[load(prefill.prefill(), "t", [4, 5, 6])])
    eventually(lambda: control.counts()["h2d"].calls > before)
    order: list[str] = []

    def release() -> None:
        order.append("the device goes on")
        control.release()

    released = threading.Timer(0.2, release)
    released.start()
    sleep(decode)
    order.append("asleep")
    assert order == ["the device goes on", "asleep"]
    released.join()
    assert decode.step(forward=False).failed == {"d-t"}
    wake_up(decode, 3)
    assert handed_over(prefill, decode, "after", [1, 2, 3], [7, 2, 5])


def test_what_decode_waits_for_fails_when_prefill_sleeps(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    prefill, decode = pair
    begun(prefill, decode)
    with caplog.at_level(logging.DEBUG, "sage_kv_connector"):
        sleep(prefill)
        assert decode.until(lambda one: bool(one.received)).failed == {"d-t"}
    assert "transfer t: given up: vLLM discards its KV cache (sleep)" in caplog.text
    wake_up(prefill, 3)
    assert handed_over(prefill, decode, "after", [1, 2, 3], [7, 2, 5])


def test_no_memory_of_ours_stays_on_a_device_whose_engine_sleeps(pair: Pair) -> None:
    prefill, decode = pair
    assert handed_over(prefill, decode, "before", [1, 2, 3], [4, 5, 6])
    runtime = prefill.rig.runtime
    before, _ = runtime.memory_info(0)
    for worker in pair:
        sleep(worker)
    asleep, _ = runtime.memory_info(0)
    kv = sum(len(one) for worker in pair for one in worker.cache.memory)
    buffers = 2 * BUFFERED_PARTS * LARGEST_PART_BYTES if runtime.vendor in BY_ADDRESS else 0
    assert asleep - before >= kv + len(pair) * buffers
    for seed, worker in enumerate(pair):
        wake_up(worker, 7 + seed)
    assert handed_over(decode, prefill, "back", [1, 2, 3], [4, 5, 6])
