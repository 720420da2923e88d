# SPDX-License-Identifier: Apache-2.0
"""Two processes, no inference engine: pages of one land in scattered pages of the other."""

import asyncio
import multiprocessing
from typing import Any

import numpy as np

from sage_kv_connector import DeviceSpec, KVChunk, Segment, TransportEngine

PAGE, COUNT = 65536, 256


def chunk_of(pages: Any, order: Any) -> KVChunk:
    return KVChunk("request-1", tuple(Segment(pages[i].ctypes.data, PAGE) for i in order))


async def prefill(pipe: Any) -> None:
    pages = np.random.default_rng(0).integers(0, 256, (COUNT, PAGE), dtype=np.uint8)
    async with TransportEngine() as engine:
        engine.register_memory([Segment(pages.ctypes.data, pages.nbytes)])
        pipe.send(engine.spec)
        await engine.send_kv_chunk(chunk_of(pages, range(COUNT)), DeviceSpec())


async def decode(pipe: Any) -> None:
    pages, order = np.zeros((COUNT, PAGE), np.uint8), np.random.default_rng(1).permutation(COUNT)
    async with TransportEngine() as engine:
        engine.register_memory([Segment(pages.ctypes.data, pages.nbytes)])
        stats = await engine.recv_kv_chunk(chunk_of(pages, order), pipe.recv())
    sent = np.random.default_rng(0).integers(0, 256, (COUNT, PAGE), dtype=np.uint8)
    print(f"{stats.nbytes >> 20} MiB over {stats.backend} at {stats.gbytes_per_s:.1f} GB/s,", end=" ")
    print("every byte equal" if np.array_equal(pages[order], sent) else "BYTES DIFFER")


def run(side: Any, pipe: Any) -> None:
    asyncio.run(side(pipe))


if __name__ == "__main__":
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.get_context("spawn").Process(target=run, args=(prefill, theirs)).start()
    run(decode, ours)
