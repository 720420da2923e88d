# SPDX-License-Identifier: Apache-2.0
"""SGLang's ranks over pools on (emulated) devices: pages are final when the device computed them, its scheduler's
thread waits for nothing, and decode's status says that pages and metadata can be read."""

from __future__ import annotations

import contextlib
import logging

import numpy as np
import pytest

from sage_kv_connector.devices.runtime import DeviceError
from sage_kv_connector.engine.conversion import staging
from sage_kv_connector.integrations.common.accelerator import device_named
from sage_kv_connector.integrations.sglang.options import CONFIG_ENV
from sage_kv_connector.vendors import VENDORS
from tests.engine.paged_side import eventually
from tests.sglang.on_device import (
    DECODE,
    HERE,
    IN_PARTS,
    KV,
    LATENT,
    MEMORY,
    PREFILL,
    ROOM,
    ROW,
    STANDS_S,
    THEIR_ROW,
    THERE,
    TORCH,
    Layout,
    Serve,
    array,
    compare,
    failed,
    landed,
    status,
)
from tests.sglang.stand_in import KVPoll
from tests.vendors.rig import Rig


@pytest.mark.parametrize("layout", [KV, LATENT])
@pytest.mark.parametrize("recorded_by", ["sglang", "us"])
def test_pages_are_sent_when_the_device_computed_them(
    serve: Serve, rig: Rig, layout: Layout, recorded_by: str
) -> None:
    prefill = serve(PREFILL, rig, layout)
    decode = serve(DECODE, None, layout)
    sender = prefill.sender(ROOM, len(THERE), ROW)
    receiver = decode.receiver(prefill, ROOM, HERE, THEIR_ROW)
    before = [one.copy() for one in decode.pool]
    rig.control.hold("h2d")  # SGLang's stream stands still: nothing is computed yet
    for chunk in (THERE[:2], THERE[2:]):
        prefill.launch(chunk)
        prefill.watched.called.clear()
        if recorded_by == "sglang":
            sender._early_send_wait_event = prefill.event()
        sender.send(array(chunk))
        is_last = chunk == THERE[2:]
        ours = ["event_record"] if recorded_by == "us" or is_last else []
        assert prefill.watched.called == ours
    assert not prefill.manager.computed.settle(STANDS_S)
    assert all(np.array_equal(one, copy) for one, copy in zip(decode.pool, before, strict=True))
    assert status(receiver) == KVPoll.Transferring
    rig.control.release()
    landed(receiver, decode)
    compare(prefill, decode)
    eventually(lambda: status(sender) == KVPoll.Success)


def test_a_chunk_is_sent_while_the_next_one_is_computed(
    serve: Serve, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bound in ("SMALLEST_PART_BYTES", "LARGEST_PART_BYTES"):  # so that a chunk is more than a part
        monkeypatch.setattr(staging, bound, 4096)
    layout = Layout(page_size=128)
    prefill, decode = serve(PREFILL, rig, layout), serve(DECODE, None, layout)
    sender = prefill.sender(ROOM, len(THERE), ROW)
    receiver = decode.receiver(prefill, ROOM, HERE, THEIR_ROW)
    prefill.launch(THERE[:2])
    sender.send(array(THERE[:2]))
    assert prefill.manager.computed.settle(10)
    rig.control.hold("h2d")
    prefill.launch(THERE[2:])
    sender.send(array(THERE[2:]))
    eventually(lambda: prefill.manager.core.counters()["bytes_sent"] > 0)
    assert status(receiver) == KVPoll.Transferring
    rig.control.release()
    landed(receiver, decode)
    compare(prefill, decode)


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("ours", [KV, LATENT])
@pytest.mark.parametrize("page_size", [16, 32])
def test_device_to_device_with_metadata_where_sglang_keeps_it(
    serve: Serve, vendor: str, ours: Layout, page_size: int
) -> None:
    on_device = TORCH[vendor] == "npu"
    prefill = serve(PREFILL, Rig(vendor, memory_bytes=MEMORY), ours, metadata_on_device=on_device)
    theirs = ours._replace(page_size=page_size)
    decode = serve(DECODE, Rig(vendor, memory_bytes=MEMORY), theirs, metadata_on_device=on_device)
    here = HERE if theirs == ours else HERE[:2]
    sender = prefill.sender(ROOM, len(THERE), ROW)
    receiver = decode.receiver(prefill, ROOM, here, THEIR_ROW)
    prefill.launch(THERE)
    if on_device:
        prefill.launch_row(ROW)
    sender.send(array(THERE))
    landed(receiver, decode)
    compare(prefill, decode, here=here)


def test_a_latent_in_two_parts_between_equal_pools(serve: Serve) -> None:
    prefill, decode = (
        serve(role, Rig("ascend", memory_bytes=MEMORY), IN_PARTS, metadata_on_device=True)
        for role in (PREFILL, DECODE)
    )
    receiver = decode.receiver(prefill, ROOM, HERE, THEIR_ROW)
    prefill.launch(THERE)
    prefill.launch_row(ROW)
    prefill.sender(ROOM, len(THERE), ROW).send(array(THERE))
    landed(receiver, decode)
    compare(prefill, decode)


def test_indices_are_read_when_the_device_has_copied_them(serve: Serve) -> None:
    """Where SGLang has CUDA's events it hands over pinned tensors, and needs not wait for their content itself."""
    rig = Rig("nvidia", memory_bytes=MEMORY)
    prefill, decode = serve(PREFILL, rig), serve(DECODE, None)
    sender = prefill.sender(ROOM, len(THERE), ROW)
    assert sender.supports_host_tensor_indices
    receiver = decode.receiver(prefill, ROOM, HERE, THEIR_ROW)
    indices = array([0] * len(THERE))
    rig.control.hold("h2d")
    prefill.launch(THERE)
    event = prefill.event()
    sender.send(indices, indices_event=event)
    indices[:] = THERE
    rig.control.release()
    landed(receiver, decode)
    compare(prefill, decode)


def test_without_cudas_events_sglang_hands_arrays_over(serve: Serve) -> None:
    for server in (serve(PREFILL, None), serve(PREFILL, Rig("ascend", memory_bytes=MEMORY))):
        assert not server.sender(ROOM, 1, ROW).supports_host_tensor_indices


@pytest.mark.parametrize("end", ["abort", "clear"])
def test_a_request_that_ends_while_its_event_is_waited_for_offers_nothing(
    serve: Serve, rig: Rig, end: str
) -> None:
    prefill, decode = serve(PREFILL, rig, metadata_on_device=True), serve(DECODE, None)
    sender = prefill.sender(ROOM, len(THERE), ROW)
    receiver = decode.receiver(prefill, ROOM, HERE, THEIR_ROW)
    rig.control.hold("h2d")
    prefill.launch(THERE)
    sender.send(array(THERE))
    getattr(sender, end)()
    failed(receiver, decode, "prefill ")
    rig.control.release()
    assert prefill.manager.computed.settle(10)
    counters = prefill.manager.core.counters()
    assert counters["offers"] == 0 and counters["d2h_bytes"] == 0
    assert prefill.manager.metadata._on_device.from_device.jobs == 0


def test_what_a_device_lost_fails_the_room_by_its_name_and_is_told_once(
    serve: Serve, rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "sage_kv_connector")
    prefill, decode = serve(PREFILL, rig), serve(DECODE, None)
    sender = prefill.sender(ROOM, len(THERE), ROW)
    receiver = decode.receiver(prefill, ROOM, HERE, THEIR_ROW)
    rig.control.set(dma_error_after_copies=0)
    with contextlib.suppress(DeviceError):  # some vendors tell it at the next launch, others with the event
        prefill.launch(THERE)
    sender.send(array(THERE))
    failed(sender, prefill, "prefill's device failed")
    assert rig.runtime.vendor in prefill.manager.failure_records[ROOM]
    failed(receiver, decode, "prefill's device failed")
    sender.clear()
    eventually(lambda: prefill.manager.core.counters()["offers"] == 0)
    told = [one for one in caplog.records if f"room {ROOM}," in one.getMessage()]
    for what in ("was not fetched", "did not arrive"):
        (line,) = [one for one in told if what in one.getMessage()]
        assert line.levelno == logging.WARNING
    assert len(told) == 2


def test_weights_that_are_replaced_fail_rooms_that_wait_for_the_device(serve: Serve, rig: Rig) -> None:
    prefill, decode = serve(PREFILL, rig), serve(DECODE, None)
    sender = prefill.sender(ROOM, len(THERE), ROW)
    receiver = decode.receiver(prefill, ROOM, HERE, THEIR_ROW)
    rig.control.hold("h2d")
    prefill.launch(THERE)
    sender.send(array(THERE))
    prefill.manager.rooms.void("the weights were replaced (version 2)")
    failed(sender, prefill, "the weights were replaced")
    failed(receiver, decode, "the weights were replaced")
    rig.control.release()
    assert prefill.manager.computed.settle(10)
    assert prefill.manager.core.counters()["offers"] == 0


def test_other_devices_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"KV lies on musa:3; allowed: cpu, cuda, .*npu"):
        device_named("musa", 3)
    assert device_named("cpu", 0) is None
    for kind in TORCH.values():
        assert str(device_named(kind, 2)) == f"{kind}:2"
    assert str(device_named("npu:5", 2)) == "npu:5"


def test_what_a_device_does_not_allow_is_refused_by_name(
    serve: Serve, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for field, value in (("state_types", ["mamba"]), ("kv_buf_groups", 3)):
        with pytest.raises(ValueError, match=rf"{field}.*can't be transferred"):
            serve(PREFILL, rig, **{field: value})
    monkeypatch.setenv(CONFIG_ENV, "audit_file=a.jsonl")
    with pytest.raises(
        ValueError, match=rf"audit_file is 'a.jsonl', but KV lies on {TORCH[rig.runtime.vendor]}:0"
    ):
        serve(PREFILL, rig)
