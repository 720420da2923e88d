# SPDX-License-Identifier: Apache-2.0
"""KV on a device (emulated) reaches KV on a device or on the host, whatever else differs; and its faults."""

from __future__ import annotations

import os

import numpy as np
import pytest

from sage_kv_connector.contract.element_order import packed_cpu_planes, strided
from sage_kv_connector.devices.runtime import DeviceOutOfMemory
from sage_kv_connector.engine.conversion.bounce import box_runs, page_bytes
from tests.engine.converting_side import ConvertingSide, Shape
from tests.engine.device_side import DeviceSide
from tests.engine.paged_side import eventually
from tests.engine.test_conversion import TOKENS, MakeCore, check, pages_for, write_content
from tests.vendors.rig import Rig

PAGES = 24


def machine(vendor: str) -> Rig:
    """``vendor``: with "-" in front without kernels, whose KV the CPU converts."""
    return Rig(vendor.removeprefix("-"), kernels=not vendor.startswith("-"), memory_bytes=160 << 20)


MACHINES = {
    "-ascend": "by the CPU", "ascend": "by Ascend C kernels", "nvidia": "by CUDA kernels",
    "cambricon": "by BANG kernels", "kunlunxin": "by XPU kernels",
}  # fmt: skip


@pytest.fixture(params=list(MACHINES), ids=list(MACHINES.values()))
def rig(request: pytest.FixtureRequest) -> Rig:
    return machine(request.param)


def hand_over(prefill: ConvertingSide, decode: ConvertingSide, tokens: range, wire: str = "auto") -> None:
    there, here = pages_for(prefill, 1), pages_for(decode, 2)
    content = write_content(prefill, there, range(TOKENS))
    others = decode.cache[0].copy()
    if isinstance(prefill, DeviceSide):
        prefill.upload()
    offer = prefill.offer("t", there)
    prefill.ready("t", offer, slice(None), len(there))
    prefill.core.finish("t")
    decode.subscribe(prefill, "t", tokens, here, finished=True)
    outcome = decode.outcomes.get(timeout=10)
    assert outcome.ok, outcome.error
    assert prefill.released.get(timeout=5).ok
    if isinstance(decode, DeviceSide):
        decode.download()
    check(prefill, decode, content, here, tokens, wire)
    untouched = [page for page in range(PAGES) if page not in here]
    np.testing.assert_array_equal(decode.cache[0][untouched], others[untouched])
    for side in (prefill, decode):
        counters = side.core.counters()
        assert (counters["staging_bytes"], counters["conversions"], counters["offers"]) == (0, 0, 0)


@pytest.mark.parametrize("wire", ["auto", "fp8_e4m3", "int4"])
@pytest.mark.parametrize("order", ["hnd", "nhd"])
def test_device_to_device(make_native_core: MakeCore, rig: Rig, order: str, wire: str) -> None:
    prefill = DeviceSide(make_native_core, Shape(order=order), PAGES, rig)
    decode = DeviceSide(make_native_core, Shape(order=order), PAGES, rig, target_dtype=wire)
    hand_over(prefill, decode, range(32, TOKENS), wire)


def test_host_to_device_of_another_page_size_and_dtype(make_native_core: MakeCore, rig: Rig) -> None:
    prefill = ConvertingSide(make_native_core, Shape(page_size=12, packing="cpu-vec"), PAGES)
    decode = DeviceSide(
        make_native_core, Shape(dtype="fp8_e4m3", scales=(0.25, 0.3), order="nhd"), PAGES, rig
    )
    hand_over(prefill, decode, range(5, TOKENS))


def test_device_to_host(make_native_core: MakeCore, rig: Rig) -> None:
    prefill = DeviceSide(make_native_core, Shape(order="nhd", page_size=8), PAGES, rig)
    decode = ConvertingSide(make_native_core, Shape(packing="cpu-amx"), PAGES)
    hand_over(prefill, decode, range(16, TOKENS))


def test_two_prefill_devices_fill_the_heads_of_one_page_together(make_native_core: MakeCore) -> None:
    """Each writes its own heads only: nothing of the other's is read or overwritten."""
    decode = DeviceSide(make_native_core, Shape(order="nhd"), PAGES, Rig("hygon", memory_bytes=64 << 20))
    here, tokens = pages_for(decode, 2), range(0, TOKENS)
    sides = []
    for heads in ((0, 2), (2, 4)):
        prefill = DeviceSide(
            make_native_core, Shape(heads=heads), PAGES, Rig("nvidia", memory_bytes=64 << 20)
        )
        there = pages_for(prefill, heads[0])
        content = write_content(prefill, there, range(TOKENS))
        prefill.upload()
        offer = prefill.offer("t", there)
        prefill.ready("t", offer, slice(None), len(there))
        prefill.core.finish("t")
        decode.subscribe(prefill, "t", tokens, here, finished=True)
        sides.append((prefill, content))
    for _ in sides:
        outcome = decode.outcomes.get(timeout=10)
        assert outcome.ok, outcome.error
    decode.download()
    for prefill, content in sides:
        check(prefill, decode, content, here, tokens, "auto")


@pytest.mark.parametrize("vendor", MACHINES)
@pytest.mark.parametrize("faulty", ["prefill", "decode"])
@pytest.mark.parametrize("fault", ["dma_error_after_copies", "device_lost_after_copies"])
def test_a_fault_in_mid_transfer_ends_it_with_the_vendors_error_and_leaves_nothing(
    make_native_core: MakeCore, fault: str, faulty: str, vendor: str
) -> None:
    rigs = {side: machine(vendor) for side in ("prefill", "decode")}
    prefill = DeviceSide(make_native_core, Shape(), PAGES, rigs["prefill"])
    decode = DeviceSide(make_native_core, Shape(), PAGES, rigs["decode"])
    there, here = pages_for(prefill, 1), pages_for(decode, 2)
    content = write_content(prefill, there, range(TOKENS))
    prefill.upload()
    control = rigs[faulty].control
    control.set(**{fault: 7 if vendor == "-ascend" else 0})  # a part is one copy where kernels pack it
    offer = prefill.offer("t", there)
    prefill.ready("t", offer, slice(None), len(there))
    prefill.core.finish("t")
    decode.subscribe(prefill, "t", range(TOKENS), here, finished=True)
    outcome = decode.outcomes.get(timeout=10)
    assert not outcome.ok and f"{vendor.removeprefix('-')}: " in outcome.error, outcome
    delivered = prefill.released.get(timeout=5).ok
    assert not delivered or faulty == "decode"  # what decode's device does is not the producer's loss
    for side in (prefill, decode):
        eventually(lambda side=side: side.core.counters()["staging_bytes"] == 0)  # type: ignore[misc]
        counters = side.core.counters()
        assert (counters["conversions"], counters["offers"], counters["subscriptions"]) == (0, 0, 0)
    if fault == "device_lost_after_copies":
        return
    control.set(**{fault: None})  # one copy failed, the device works: so must the next transfer
    offer = prefill.offer("again", there)
    prefill.ready("again", offer, slice(None), len(there))
    prefill.core.finish("again")
    eventually(lambda: prefill.core.counters()["offers"] == 1)
    decode.subscribe(prefill, "again", range(TOKENS), here, finished=True)
    outcome = decode.outcomes.get(timeout=10)
    assert outcome.ok, outcome.error
    decode.download()
    check(prefill, decode, content, here, range(TOKENS), "auto")


def test_no_pinned_memory_is_an_error_of_the_transfer(
    make_native_core: MakeCore, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = DeviceSide(make_native_core, Shape(), PAGES, rig, staging_bytes=16 << 20)
    decode = ConvertingSide(make_native_core, Shape(), PAGES)
    there, here = pages_for(prefill, 1), pages_for(decode, 2)

    def refuse(device: int, nbytes: int) -> int:
        raise DeviceOutOfMemory("ascend", "aclrtMallocHost", 207001, "ACL_ERROR_RT_MEMORY_ALLOCATION")

    monkeypatch.setattr(rig.runtime, "host_alloc", refuse)
    offer = prefill.offer("t", there)
    prefill.ready("t", offer, slice(None), len(there))
    decode.subscribe(prefill, "t", range(TOKENS), here)
    outcome = decode.outcomes.get(timeout=10)
    assert not outcome.ok and "staging_bytes" in outcome.error, outcome


def test_a_closed_engine_gives_its_pinned_memory_back(
    make_native_core: MakeCore, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[int, int] = {}
    alloc, free = rig.runtime.host_alloc, rig.runtime.host_free

    def noted(device: int, nbytes: int) -> int:
        address = alloc(device, nbytes)
        held[address] = nbytes
        return address

    def given_back(device: int, address: int) -> None:
        del held[address]
        free(device, address)

    monkeypatch.setattr(rig.runtime, "host_alloc", noted)
    monkeypatch.setattr(rig.runtime, "host_free", given_back)
    prefill = ConvertingSide(make_native_core, Shape(), PAGES)
    decode = DeviceSide(make_native_core, Shape(), PAGES, rig)
    of_test = set(held)
    there, here = pages_for(prefill, 1), pages_for(decode, 2)
    offer = prefill.offer("t", there)
    prefill.ready("t", offer, slice(None), len(there))
    decode.subscribe(prefill, "t", range(TOKENS), here)
    assert decode.outcomes.get(timeout=10).ok
    assert set(held) - of_test, "bytes were staged in it"
    decode.core.close()
    assert set(held) == of_test


def test_a_closed_engine_leaves_no_thread(make_native_core: MakeCore, rig: Rig) -> None:
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    before = threads()
    side = DeviceSide(make_native_core, Shape(), PAGES, rig)
    assert threads() > before
    side.core.close()
    eventually(lambda: threads() <= before)


def test_cancel_waits_for_the_copy_that_is_under_way(make_native_core: MakeCore, rig: Rig) -> None:
    prefill = ConvertingSide(make_native_core, Shape(), PAGES)
    decode = DeviceSide(make_native_core, Shape(), PAGES, rig)
    there, here = pages_for(prefill, 1), pages_for(decode, 2)
    write_content(prefill, there, range(TOKENS))
    offer = prefill.offer("t", there)
    prefill.ready("t", offer, slice(None), len(there))
    rig.control.set(h2d_gbytes_per_s=0.01)  # some tens of milliseconds
    started = decode.subscribe(prefill, "t", range(TOKENS), here)
    eventually(lambda: decode.core.counters()["conversions"] > 1)  # the transfer, and a part
    decode.core.cancel(started[0])
    outcome = decode.outcomes.get(timeout=10)
    assert not outcome.ok and "cancelled" in outcome.error
    decode.download()
    before = [layer.copy() for layer in decode.cache]
    decode.download()
    for layer, known in zip(decode.cache, before, strict=True):
        np.testing.assert_array_equal(layer, known)


def test_who_has_all_bytes_needs_no_session_to_place_them(make_native_core: MakeCore, rig: Rig) -> None:
    prefill = ConvertingSide(make_native_core, Shape(), PAGES)
    decode = DeviceSide(make_native_core, Shape(), PAGES, rig)
    there, here = pages_for(prefill, 1), pages_for(decode, 2)
    content = write_content(prefill, there, range(TOKENS))
    rig.control.hold("h2d")
    offer = prefill.offer("t", there)
    prefill.ready("t", offer, slice(None), len(there))
    prefill.core.finish("t")
    decode.subscribe(prefill, "t", range(TOKENS), here, finished=True)
    assert prefill.released.get(timeout=5).ok
    prefill.core.close()
    eventually(lambda: decode.core.counters()["sessions"] == 0)
    assert decode.outcomes.empty()
    rig.control.release()
    outcome = decode.outcomes.get(timeout=10)
    assert outcome.ok, outcome.error
    decode.download()
    check(prefill, decode, content, here, range(TOKENS), "auto")


@pytest.mark.parametrize("heads_first", [True, False])
def test_a_page_reaches_from_its_first_to_its_last_element(heads_first: bool) -> None:
    heads, tokens, dim, item = 4, 16, 32, 2
    row = dim * item
    head, token = (tokens * row, row) if heads_first else (row, heads * row)
    assert page_bytes(strided(0, head, token, item), tokens, heads, dim, item) == heads * tokens * row
    # K beside V in one row: what lies behind the last channel belongs to the other plane.
    assert page_bytes(strided(0, 2 * head, 2 * token, item), tokens, heads, dim, item) == (
        2 * heads * tokens * row - row
    )


def test_runs_of_a_box_are_merged_where_they_touch() -> None:
    nhd = strided(0, 64, 4 * 64, 2)  # 4 heads of 32 elements of 2 bytes
    offsets, run = box_runs(nhd, 32, 2, 0, 4, 3, 5)
    assert (offsets.tolist(), run) == ([3 * 256], 5 * 256)
    offsets, run = box_runs(nhd, 32, 2, 1, 2, 3, 2)
    assert (offsets.tolist(), run) == ([3 * 256 + 64, 4 * 256 + 64], 128)
    packed = packed_cpu_planes("cpu-vec", 2, 16, 32)
    assert packed is not None
    with pytest.raises(ValueError, match="is packed"):
        box_runs(packed[0], 32, 2, 0, 1, 0, 16)


def test_reading_and_encoding_go_on_while_writing_stands_still(make_native_core: MakeCore) -> None:
    """Stages overlap: what fits into staging memory is read, encoded and sent before one page is written."""
    rigs = (Rig("ascend", kernels=False, memory_bytes=64 << 20), Rig("cambricon", memory_bytes=64 << 20))
    prefill = DeviceSide(make_native_core, Shape(), PAGES, rigs[0])
    decode = DeviceSide(make_native_core, Shape(), PAGES, rigs[1])
    there, here = pages_for(prefill, 1), pages_for(decode, 2)
    content = write_content(prefill, there, range(TOKENS))
    prefill.upload()
    rigs[1].control.hold("h2d")
    offer = prefill.offer("t", there)
    prefill.ready("t", offer, slice(None), len(there))
    prefill.core.finish("t")
    decode.subscribe(prefill, "t", range(TOKENS), here, finished=True)
    whole = sum(raw.nbytes for raw in content.values())
    eventually(lambda: prefill.core.counters()["d2h_bytes"] == whole)
    assert decode.core.counters()["h2d_bytes"] == 0 and decode.outcomes.empty()
    rigs[1].control.release()
    outcome = decode.outcomes.get(timeout=10)
    assert outcome.ok, outcome.error
    decode.download()
    check(prefill, decode, content, here, range(TOKENS), "auto")


def test_a_box_that_the_devices_dma_can_t_take_is_named(make_native_core: MakeCore) -> None:
    prefill = DeviceSide(make_native_core, Shape(order="nhd"), PAGES, Rig("ascend", memory_bytes=64 << 20))
    strict = Rig("ascend", kernels=False, memory_bytes=64 << 20, dma_alignment_bytes=4096)
    decode = DeviceSide(make_native_core, Shape(order="nhd"), PAGES, strict)
    there, here = pages_for(prefill, 1), pages_for(decode, 2)
    offer = prefill.offer("t", there)
    prefill.ready("t", offer, slice(None), len(there))
    prefill.core.finish("t")
    decode.subscribe(prefill, "t", range(5, TOKENS), here, finished=True)  # begins inside a page
    outcome = decode.outcomes.get(timeout=10)
    assert not outcome.ok and "ascend: " in outcome.error and "align" in outcome.error.lower(), outcome
    eventually(lambda: decode.core.counters()["staging_bytes"] == 0)
