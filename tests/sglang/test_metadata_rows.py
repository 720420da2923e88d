# SPDX-License-Identifier: Apache-2.0
"""SGLang's decode over (emulated) devices, and its metadata rows where a device keeps them: a status says that
pages and row can be read, and a row is left alone once its request ended."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from sage_kv_connector.contract.bootstrap_room import MetadataKind, metadata_transfer, pages_transfer
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.engine import MemorySource, OfferTerms
from sage_kv_connector.integrations.common.accelerator import NamedDevice
from sage_kv_connector.integrations.sglang import metadata_rows
from tests.engine.paged_side import eventually
from tests.sglang.on_device import (
    DECODE,
    HERE,
    PREFILL,
    ROOM,
    ROW,
    STANDS_S,
    THEIR_ROW,
    THERE,
    TORCH,
    Serve,
    array,
    compare,
    failed,
    landed,
    status,
)
from tests.sglang.stand_in import KVPoll
from tests.vendors.rig import Rig


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
