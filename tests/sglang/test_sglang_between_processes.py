# SPDX-License-Identifier: Apache-2.0
"""Two SGLang servers of one node with equal pools on (emulated) devices: pages go from device to device."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from typing import Any

import msgspec
import pytest

from sage_kv_connector.contract.bootstrap_room import MetadataKind
from sage_kv_connector.integrations.common.prefill_ranks import PrefillEngine
from sage_kv_connector.integrations.sglang.options import CONFIG_ENV
from tests.engine.paged_side import eventually
from tests.other_process import other_process
from tests.sglang.on_device import (
    HERE,
    KV,
    MEMORY,
    ROOM,
    ROW,
    STANDS_S,
    THEIR_ROW,
    THERE,
    TORCH,
    Layout,
    Server,
    array,
)
from tests.sglang.stand_in import DisaggregationMode, KVPoll, install
from tests.vendors.rig import Rig

#: The prefill server: sends pages that its device has not computed, and lets it compute when told.
CHILD = """
import sys
import pytest
from tests.sglang.test_sglang_between_processes import prefill
with pytest.MonkeyPatch.context() as monkeypatch:
    prefill(monkeypatch, *sys.argv[1:])
"""

#: Of 64 tokens three pages hold the last 40.
LAYOUTS = {"one pool": KV, "hybrid pool": KV._replace(window=40)}
WINDOWS_THERE, WINDOWS_HERE = [5, 2, 11], [7, 12, 3]


def serve(monkeypatch: pytest.MonkeyPatch, mode: DisaggregationMode, vendor: str, layout: Layout) -> Server:
    monkeypatch.setenv(CONFIG_ENV, "backend=pcie,same_weights=false")
    rig = Rig(vendor, memory_bytes=MEMORY)
    on_device = TORCH[vendor] == "npu"
    return Server(monkeypatch, install(monkeypatch), mode, rig, layout, metadata_on_device=on_device)


def digest(server: Server, pages: list[int], windows: list[int], row: int) -> str:
    tokens = b"".join(one.tobytes() for one in server.tokens(pages))
    tokens += b"".join(one[windows].tobytes() for one in server.windows)
    return hashlib.sha256(tokens + b"".join(server.row(row))).hexdigest()


def prefill(monkeypatch: pytest.MonkeyPatch, vendor: str, layout: str) -> None:
    server = serve(monkeypatch, DisaggregationMode.PREFILL, vendor, LAYOUTS[layout])
    assert server.rig is not None
    sender = server.sender(ROOM, len(THERE), ROW)
    server.rig.control.hold("h2d")
    server.launch(THERE, WINDOWS_THERE)
    sender.send(array(THERE), [array(WINDOWS_THERE)])
    address = msgspec.to_builtins(server.address(MetadataKind.SGLANG_ROW))
    print(json.dumps([address, digest(server, THERE, WINDOWS_THERE, ROW)]), flush=True)
    sys.stdin.readline()
    server.rig.control.release()
    print(json.dumps("computed"), flush=True)
    sys.stdin.readline()
    eventually(lambda: sender.poll() == KVPoll.Success)
    print(server.manager.core.counters()["d2h_bytes"], flush=True)
    sys.stdin.readline()
    server.close()


class There:
    """What decode asks of the other process."""

    def __init__(self, engine: PrefillEngine) -> None:
        self._engine = engine

    def address(self, _: MetadataKind) -> PrefillEngine:
        return self._engine


@pytest.mark.parametrize("vendor", ["nvidia", "ascend"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_go_from_device_to_device_once_they_are_computed(
    monkeypatch: pytest.MonkeyPatch, vendor: str, layout: str
) -> None:
    decode = serve(monkeypatch, DisaggregationMode.DECODE, vendor, LAYOUTS[layout])
    with other_process(CHILD, vendor, layout) as other:
        try:
            address, wanted = other.hear()
            there: Any = There(msgspec.convert(address, PrefillEngine))
            receiver = decode.receiver(there, ROOM, HERE, THEIR_ROW, windows=WINDOWS_HERE)
            time.sleep(STANDS_S)
            assert receiver.poll() == KVPoll.Transferring
            assert other.say("compute") == "computed"
            eventually(lambda: receiver.poll() != KVPoll.Transferring)
            assert receiver.poll() == KVPoll.Success, decode.manager.failure_records
            decode.read()
            assert digest(decode, HERE, WINDOWS_HERE, THEIR_ROW) == wanted
            counters = decode.manager.core.counters()
            nbytes = sum(one[HERE].nbytes for one in decode.pool)
            nbytes += sum(one[WINDOWS_HERE].nbytes for one in decode.windows)
            assert counters["d2d_bytes"] == nbytes
            assert (counters["h2d_bytes"], other.say("copied")) == (0, 0)
        finally:
            decode.close()
