# SPDX-License-Identifier: Apache-2.0
"""What the peers' transfer programs share: two processes, shuffled blocks, and the lines that drive them.

The same lines as ``sage_kv_connector.bench.pair`` takes: run, small, verify, quit; and cost, of a peer that tells
its own.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Protocol, runtime_checkable

import numpy as np

from sage_kv_connector.bench.pair import SEED, SMALL_BYTES, SMALL_OPS, Blocks, say, take_cores


class Reader(Protocol):
    """The active side of a peer: reads the other process's memory into its own."""

    def move_all(self) -> None:
        """Every block, each into its place."""

    def move_one(self) -> None:
        """The first SMALL_BYTES."""


@runtime_checkable
class CostedReader(Reader, Protocol):
    """One that can tell what reading every block takes from the thread that asks for it."""

    def cost_ms(self) -> float:
        """CPU time of that thread in milliseconds, once."""


def drive(
    name: str,
    version: str,
    block: int,
    total: int,
    make_reader: Callable[[Blocks, Connection], Reader],
    serve: Callable[[Connection, int, int], None],
) -> None:
    """Start ``serve`` in another process, then do what stdin says until quit or its end."""
    context = multiprocessing.get_context("spawn")
    pipe, peer_pipe = context.Pipe()
    process = context.Process(target=serve, args=(peer_pipe, block, total), daemon=True)
    process.start()
    take_cores(0)
    target = Blocks(total, block, SEED + 1, filled=False)
    reader = make_reader(target, pipe)
    say({"name": name, "version": version})
    say("ready")
    for line in sys.stdin:
        match line.strip():
            case "run":
                begun = time.perf_counter()
                reader.move_all()
                say({"gbytes_per_s": total / (time.perf_counter() - begun) / 1e9})
            case "small":
                say(_small(reader))
            case "cost" if isinstance(reader, CostedReader):
                say({"cost_ms": reader.cost_ms()})
            case "verify":
                say({"verified": _verified(reader, target)})
            case "quit":
                break
    pipe.send("quit")
    process.join(3)
    process.kill()


def _small(reader: Reader) -> dict[str, Any]:
    microseconds = []
    for _ in range(SMALL_OPS):
        begun = time.perf_counter()
        reader.move_one()
        microseconds.append((time.perf_counter() - begun) * 1e6)
    return {
        "small_op_us_p50": float(np.percentile(microseconds, 50)),
        "small_op_us_p99": float(np.percentile(microseconds, 99)),
    }


def _verified(reader: Reader, target: Blocks) -> bool:
    target.data[:] = 0
    reader.move_all()
    source = Blocks(len(target.data), target.block, SEED, filled=True)
    rows = (-1, target.block)
    return np.array_equal(target.data.reshape(rows)[target.order], source.data.reshape(rows)[source.order])


def served_blocks(block: int, total: int) -> Blocks:
    """What the other process lets be read."""
    take_cores(1)
    blocks = Blocks(total, block, SEED, filled=True)
    assert total >= SMALL_BYTES
    return blocks
