# SPDX-License-Identifier: Apache-2.0
"""NIXL moves shuffled blocks between two processes: ``nixl_transfer.py cma|tcp BLOCK_BYTES TOTAL_BYTES``.

As vLLM's NixlConnector does it: descriptor lists are prepared once, each run makes a
READ from them and polls for its end. ``cma`` is what UCX chooses on one node.
"""

from __future__ import annotations

import os
import sys
import time
from importlib.metadata import version
from multiprocessing.connection import Connection

from baselines.peer_pair import SMALL_BYTES, Blocks, drive, served_blocks

#: An engine that has nothing else to do looks about so often.
LOOK_S = 0.005
TRANSPORTS = {"cma": "posix,cma,tcp,self", "tcp": "tcp,self"}


def agent(name: str) -> object:
    from nixl._api import nixl_agent, nixl_agent_config

    return nixl_agent(name, nixl_agent_config(backends=["UCX"]))


class NixlReader:
    def __init__(self, target: Blocks, pipe: Connection) -> None:
        self._agent = agent("reader")
        self._agent.register_memory([(target.address, len(target.data), 0, "")], "DRAM")
        metadata, segments = pipe.recv()
        self._peer = self._agent.add_remote_agent(metadata)
        self._indices = list(range(len(segments)))
        self._local = self._prepare("NIXL_INIT_AGENT", target.segments())
        self._remote = self._prepare(self._peer, segments)
        one = target.segments()[:1].copy()
        one[:, 1] = SMALL_BYTES
        there = segments[:1].copy()
        there[:, 1] = SMALL_BYTES
        self._small_local = self._prepare("NIXL_INIT_AGENT", one)
        self._small_remote = self._prepare(self._peer, there)

    def move_all(self) -> None:
        self._read(self._local, self._remote, self._indices)

    def move_one(self) -> None:
        self._read(self._small_local, self._small_remote, [0])

    def cost_ms(self) -> float:
        """Making the transfer, beginning it, and looking for its end as often as an engine steps."""
        begun = time.thread_time()
        self._read(self._local, self._remote, self._indices, LOOK_S)
        return (time.thread_time() - begun) * 1e3

    def _prepare(self, owner: str, segments: object) -> object:
        tuples = [(int(address), int(length), 0) for address, length in segments]
        return self._agent.prep_xfer_dlist(owner, tuples, "DRAM")

    def _read(self, local: object, remote: object, indices: list[int], look_s: float = 0.0) -> None:
        """``look_s``: how long it rests between two looks for the end."""
        handle = self._agent.make_prepped_xfer("READ", local, indices, remote, indices)
        state = self._agent.transfer(handle)
        while state == "PROC":
            if look_s:
                time.sleep(look_s)
            state = self._agent.check_xfer_state(handle)
        self._agent.release_xfer_handle(handle)
        if state != "DONE":
            sys.exit(f"NIXL's transfer ended with {state}")


def serve(pipe: Connection, block: int, total: int) -> None:
    blocks = served_blocks(block, total)
    served = agent("served")
    served.register_memory([(blocks.address, total, 0, "")], "DRAM")
    pipe.send((served.get_agent_metadata(), blocks.segments()))
    pipe.recv()


def main() -> None:
    transport, block, total = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    os.environ["UCX_TLS"] = TRANSPORTS[transport]
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    drive(f"nixl {transport}", version("nixl"), block, total, NixlReader, serve)


if __name__ == "__main__":
    main()
