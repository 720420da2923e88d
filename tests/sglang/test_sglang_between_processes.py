# SPDX-License-Identifier: Apache-2.0
"""Two SGLang servers of one node with equal pools on (emulated) devices: pages go from device to device."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from sage_kv_connector.contract.bootstrap_room import MetadataKind
from sage_kv_connector.integrations.common.prefill_ranks import PrefillEngine
from sage_kv_connector.integrations.sglang.options import CONFIG_ENV
from tests.engine.paged_side import eventually
from tests.sglang.on_device import HERE, MEMORY, ROOM, ROW, STANDS_S, THEIR_ROW, THERE, TORCH, Server
from tests.sglang.stand_in import DisaggregationMode, KVPoll, install
from tests.vendors.rig import Rig

#: The prefill server: sends pages that its device has not computed, and lets it compute when told.
CHILD = """
import sys
import pytest
from tests.sglang.test_sglang_between_processes import prefill
with pytest.MonkeyPatch.context() as monkeypatch:
    prefill(monkeypatch, sys.argv[1])
"""


def serve(monkeypatch: pytest.MonkeyPatch, mode: DisaggregationMode, vendor: str) -> Server:
    monkeypatch.setenv(CONFIG_ENV, "backend=pcie,same_weights=false")
    rig = Rig(vendor, memory_bytes=MEMORY)
    return Server(monkeypatch, install(monkeypatch), mode, rig, metadata_on_device=TORCH[vendor] == "npu")


def digest(server: Server, pages: list[int], row: int) -> str:
    tokens = b"".join(one.tobytes() for one in server.tokens(pages))
    return hashlib.sha256(tokens + b"".join(server.row(row))).hexdigest()


def prefill(monkeypatch: pytest.MonkeyPatch, vendor: str) -> None:
    server = serve(monkeypatch, DisaggregationMode.PREFILL, vendor)
    assert server.rig is not None
    sender = server.sender(ROOM, len(THERE), ROW)
    server.rig.control.hold("h2d")
    server.launch(THERE)
    sender.send(np.array(THERE, dtype=np.int32))
    address = msgspec.to_builtins(server.address(MetadataKind.SGLANG_ROW))
    print(json.dumps([address, digest(server, THERE, ROW)]), flush=True)
    sys.stdin.readline()
    server.rig.control.release()
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
def test_pages_go_from_device_to_device_once_they_are_computed(
    monkeypatch: pytest.MonkeyPatch, vendor: str
) -> None:
    decode = serve(monkeypatch, DisaggregationMode.DECODE, vendor)
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, vendor],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout
    try:
        address, wanted = json.loads(process.stdout.readline())
        there: Any = There(msgspec.convert(address, PrefillEngine))
        receiver = decode.receiver(there, ROOM, HERE, THEIR_ROW)
        time.sleep(STANDS_S)
        assert receiver.poll() == KVPoll.Transferring
        process.stdin.write("compute\n")
        process.stdin.flush()
        eventually(lambda: receiver.poll() != KVPoll.Transferring)
        assert receiver.poll() == KVPoll.Success, decode.manager.failure_records
        decode.read()
        assert digest(decode, HERE, THEIR_ROW) == wanted
        counters = decode.manager.core.counters()
        assert counters["d2d_bytes"] == sum(one[HERE].nbytes for one in decode.pool)
        assert (counters["h2d_bytes"], int(process.stdout.readline())) == (0, 0)
        process.stdin.close()
        process.wait(20)
    finally:
        process.kill()
        process.wait()
        decode.close()
