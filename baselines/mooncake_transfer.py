# SPDX-License-Identifier: Apache-2.0
"""Mooncake's transfer engine over tcp: ``mooncake_transfer.py tcp BLOCK_BYTES TOTAL_BYTES``.

Batches of 1,024 descriptors, since it refuses 4,096 in one.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection

from baselines.peer_pair import SMALL_BYTES, Blocks, drive, served_blocks

BATCH = 1024


def engine() -> object:
    from mooncake.engine import TransferEngine

    made = TransferEngine()
    if made.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
        sys.exit("Mooncake's transfer engine did not start")
    return made


class MooncakeReader:
    def __init__(self, target: Blocks, pipe: Connection) -> None:
        self._engine = engine()
        self._engine.register_memory(target.address, len(target.data))
        self._peer, segments = pipe.recv()
        self._local = [int(a) for a in target.segments()[:, 0]]
        self._remote = [int(a) for a in segments[:, 0]]
        self._block = target.block

    def move_all(self) -> None:
        for begin in range(0, len(self._local), BATCH):
            end = begin + BATCH
            self._read(self._local[begin:end], self._remote[begin:end], self._block)

    def move_one(self) -> None:
        self._read(self._local[:1], self._remote[:1], SMALL_BYTES)

    def _read(self, local: list[int], remote: list[int], length: int) -> None:
        if self._engine.batch_transfer_sync_read(self._peer, local, remote, [length] * len(local)) != 0:
            sys.exit("Mooncake's transfer failed")


def serve(pipe: Connection, block: int, total: int) -> None:
    blocks = served_blocks(block, total)
    served = engine()
    served.register_memory(blocks.address, total)
    pipe.send((f"127.0.0.1:{served.get_rpc_port()}", blocks.segments()))
    pipe.recv()


def mooncake_version() -> str:
    for name in ("mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def main() -> None:
    _, block, total = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    drive("mooncake tcp", mooncake_version(), block, total, MooncakeReader, serve)


if __name__ == "__main__":
    main()
