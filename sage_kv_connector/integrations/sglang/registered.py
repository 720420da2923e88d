# SPDX-License-Identifier: Apache-2.0
"""Which KV cache each scheduler rank registered, left as a file for the process that started SGLang.

SGLang has no call that reaches a transfer backend's manager and brings an answer back: its
``collective_rpc`` tells only whether it worked, and the bootstrap server knows prefill's ranks alone. So
a rank writes one file into the directory that the starter names in its environment; both roles do,
and nothing of it goes over a network.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from sage_kv_connector.contract.node import node_id
from sage_kv_connector.contract.peer import RegisteredKV
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.engine import EngineCore

#: Directory that ranks write to; unset: nobody asked.
DIRECTORY_ENV = "SAGE_KVT_REGISTERED_DIR"


def write_rank(core: EngineCore, schema: KVCacheSchema) -> None:
    """Write this rank's file, if a starter asked for it. Raises OSError."""
    if not (directory := os.environ.get(DIRECTORY_ENV)):
        return
    found = RegisteredKV(core.engine_id, core.rank, schema, tuple(core.addresses), node_id())
    (Path(directory) / f"rank-{core.rank}").write_bytes(msgspec.msgpack.encode(found))


def read_ranks(directory: Path) -> list[RegisteredKV]:
    """What the ranks wrote, by rank. Raises ValueError for a file that is not theirs."""
    decode = msgspec.msgpack.Decoder(RegisteredKV).decode
    found = []
    for path in directory.glob("rank-*"):
        try:
            found.append(decode(path.read_bytes()))
        except msgspec.MsgspecError as error:
            raise ValueError(f"{path} does not hold what a rank registered: {error}") from error
    return sorted(found, key=lambda one: one.rank)
