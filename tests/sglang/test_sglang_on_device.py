# SPDX-License-Identifier: Apache-2.0
"""SGLang's ranks over pools on (emulated) devices: pages are final when the device computed them, its scheduler's
thread waits for nothing, and decode's status says that pages and metadata can be read."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from sage_kv_connector.contract.bootstrap_room import MetadataKind, metadata_transfer, pages_transfer
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.devices.runtime import DeviceError
from sage_kv_connector.engine import MemorySource, OfferTerms
from sage_kv_connector.engine.conversion import staging
from sage_kv_connector.integrations.common.accelerator import NamedDevice, device_named
from sage_kv_connector.integrations.sglang import metadata_rows
from sage_kv_connector.integrations.sglang.options import CONFIG_ENV
from sage_kv_connector.vendors import VENDORS
from tests.engine.paged_side import eventually
from tests.sglang.on_device import KV, TORCH, Layout, Server
from tests.sglang.stand_in import DisaggregationMode, KVPoll, Surroundings, install
from tests.vendors.rig import Rig

PREFILL, DECODE = DisaggregationMode.PREFILL, DisaggregationMode.DECODE
LATENT = Layout(planes=1, dim=96)
ROOM, ROW, THEIR_ROW = 7, 1, 2
THERE, HERE = [3, 9, 4, 7], [6, 2, 8, 1]
#: So that kernels have room for their buffers.
MEMORY = 160 << 20
#: No outcome comes while a device stands still; how long a test looks.
STANDS_S = 0.2
Serve = Callable[..., Server]


@pytest.fixture
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Surroundings:
    monkeypatch.setenv(CONFIG_ENV, "backend=tcp,host=127.0.0.1,same_weights=false")
    return install(monkeypatch)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, surroundings: Surroundings) -> Iterator[Serve]:
    servers: list[Server] = []

    def make(*what: Any, **more: Any) -> Server:
        servers.append(Server(monkeypatch, surroundings, *what, **more))
        return servers[-1]

    yield make
    for server in servers:
        if server.rig is not None:
            server.rig.control.release()
        server.close()


@pytest.fixture(params=["nvidia", "ascend"])
def rig(request: pytest.FixtureRequest) -> Rig:
    return Rig(request.param, memory_bytes=MEMORY)


def status(end: Any) -> int:
    return int(end.poll())


def landed(receiver: Any, decode: Server) -> None:
    eventually(lambda: status(receiver) in (KVPoll.Success, KVPoll.Failed))
    assert status(receiver) == KVPoll.Success, decode.manager.failure_records


def failed(end: Any, server: Server, why: str) -> None:
    eventually(lambda: status(end) == KVPoll.Failed)
    eventually(lambda: why in server.manager.failure_records.get(end.bootstrap_room, ""))


def compare(prefill: Server, decode: Server, there: list[int] = THERE, here: list[int] = HERE) -> None:
    decode.read()
    for sent, got in zip(prefill.tokens(there), decode.tokens(here), strict=True):
        assert np.array_equal(sent, got)
    assert decode.row(THEIR_ROW) == prefill.row(ROW)


def array(pages: list[int]) -> Any:
    return np.array(pages, dtype=np.int32)


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


def test_decode_reads_pages_and_metadata_once_its_device_has_them(serve: Serve, rig: Rig) -> None:
    prefill, decode = serve(PREFILL, None), serve(DECODE, rig, metadata_on_device=True)
    sender = prefill.sender(ROOM, len(THERE), ROW)
    rig.control.hold("h2d")
    receiver = decode.receiver(prefill, ROOM, HERE, THEIR_ROW)
    assert decode.watched.called == ["event_record"]
    sender.send(array(THERE))
    time.sleep(STANDS_S)
    assert status(receiver) == KVPoll.Transferring
    rig.control.release()
    landed(receiver, decode)
    compare(prefill, decode)
    assert set(decode.watched.called) == {"event_record"}


def test_a_metadata_row_on_a_device_lands_after_what_sglang_still_writes_into_it(
    serve: Serve, rig: Rig
) -> None:
    """SGLang clears a row on its stream when it gives it to the next request."""
    prefill, decode = serve(PREFILL, None), serve(DECODE, rig, metadata_on_device=True)
    sender = prefill.sender(ROOM, 0, ROW)
    rig.control.hold("h2d")
    decode.launch_row(THEIR_ROW)  # stands for what clears it
    receiver = decode.receiver(prefill, ROOM, [], THEIR_ROW)
    sender.send(array([]))
    eventually(lambda: status(sender) == KVPoll.Success or prefill.manager.core.counters()["bytes_sent"] > 0)
    assert decode.manager.metadata._on_device.to_device.jobs == 0 and status(receiver) == KVPoll.Transferring
    rig.control.release()
    landed(receiver, decode)
    decode.read()
    assert decode.row(THEIR_ROW) == prefill.row(ROW)


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


def test_a_request_that_ends_on_decode_while_its_row_is_stored_leaves_the_row_alone(
    serve: Serve, rig: Rig
) -> None:
    prefill, decode = serve(PREFILL, None), serve(DECODE, rig, metadata_on_device=True)
    sender = prefill.sender(ROOM, 0, ROW)
    rig.control.hold("h2d")
    decode.launch_row(THEIR_ROW)
    receiver = decode.receiver(prefill, ROOM, [], THEIR_ROW)
    sender.send(array([]))
    eventually(lambda: receiver._storing != 0)
    receiver.clear()
    rig.control.release()
    assert decode.manager.computed.settle(10)
    assert decode.manager.metadata._on_device.to_device.jobs == 0
    wanted = decode.row(THEIR_ROW)
    decode.read()
    assert decode.row(THEIR_ROW) == wanted


def test_what_a_device_lost_fails_the_room_by_its_name(serve: Serve, rig: Rig) -> None:
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


@pytest.mark.parametrize("pages", [len(THERE), 0])
def test_a_device_that_is_lost_on_decode_fails_the_room_by_its_name(
    serve: Serve, rig: Rig, pages: int
) -> None:
    """With the pages, or where there are none with the metadata row."""
    prefill, decode = serve(PREFILL, None), serve(DECODE, rig, metadata_on_device=True)
    sender = prefill.sender(ROOM, pages, ROW)
    rig.control.set(device_lost_after_copies=0)
    receiver = decode.receiver(prefill, ROOM, HERE[:pages], THEIR_ROW)
    sender.send(array(THERE[:pages]))
    failed(receiver, decode, rig.runtime.vendor)


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


def test_weights_that_are_replaced_fail_a_room_whose_row_is_on_its_way(serve: Serve, rig: Rig) -> None:
    """Decode has the pages (none here), and no transfer is on offer that could tell of the end."""
    prefill = serve(PREFILL, rig, metadata_on_device=True)
    decode = serve(DECODE, None)
    sender = prefill.sender(ROOM, 0, ROW)
    decode.receiver(prefill, ROOM, [], THEIR_ROW)
    rig.control.hold("d2h")
    sender.send(array([]))
    eventually(lambda: prefill.manager.rooms._rooms[ROOM].settled == 1)
    prefill.manager.rooms.void("the weights were replaced (version 2)")
    failed(sender, prefill, "the weights were replaced")
    rig.control.release()


def test_the_first_token_of_another_engine_is_written_where_the_device_keeps_metadata(
    serve: Serve, rig: Rig
) -> None:
    prefill, decode = serve(PREFILL, None), serve(DECODE, rig, metadata_on_device=True)
    token = np.array([4711], dtype=np.int64)
    core = prefill.manager.core
    core.register_host_memory(token.ctypes.data, 8)
    offered = MemorySource(np.array([[token.ctypes.data, 8]], dtype=np.uint64))
    released: list[Outcome] = []
    core.offer(metadata_transfer(pages_transfer(ROOM)), offered, released.append, OfferTerms(finished=True))
    receiver = decode.receiver(prefill, ROOM, [], THEIR_ROW, MetadataKind.FIRST_TOKEN)
    landed(receiver, decode)
    others = [one.copy() for one in decode.metadata]
    decode.read()
    for one, before in zip(decode.metadata, others, strict=True):
        assert np.array_equal(np.delete(one, THEIR_ROW, 0), np.delete(before, THEIR_ROW, 0))
    first, *between, rooms = (one[THEIR_ROW] for one in decode.metadata)
    assert first.view(np.int32).tolist() == [4711] + [0] * 15
    assert rooms.view(np.uint64).tolist() == [ROOM] + [0] * 7
    assert not any(one.any() for one in between)


class Forgetful(dict[int, Any]):
    def __setitem__(self, *_: Any) -> None:
        """As if SGLang had not told it."""


def test_metadata_buffers_are_not_guessed_at(serve: Serve, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    device = f"{TORCH[rig.runtime.vendor]}:0"
    with pytest.raises(
        ValueError, match=f"metadata buffers lie on musa:1, KV on {device}; allowed: cpu, {device}"
    ):
        serve(PREFILL, rig, metadata_device=NamedDevice("musa", 1))
    monkeypatch.setattr(metadata_rows, "_devices", Forgetful())
    with pytest.raises(ValueError, match=f"aux_data_ptrs: this SGLang does not tell .* KV lies on {device}"):
        serve(PREFILL, rig)


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
    for field, value in (("state_types", ["swa"]), ("kv_buf_groups", 2)):
        with pytest.raises(ValueError, match=rf"{field}.*can't be transferred"):
            serve(PREFILL, rig, **{field: value})
    monkeypatch.setenv(CONFIG_ENV, "audit_file=a.jsonl")
    with pytest.raises(
        ValueError, match=rf"audit_file is 'a.jsonl', but KV lies on {TORCH[rig.runtime.vendor]}:0"
    ):
        serve(PREFILL, rig)
