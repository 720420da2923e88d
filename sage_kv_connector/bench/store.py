# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench store``: a batch of pages into a store and back, beside a plain copy of the same pages.

The store is a process of its own on this machine. Each round clears it, puts all pages, gets them into other
memory, and copies them once inside this process; rounds go through all ways. Figures are medians over rounds.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from sage_kv_connector.backends import host_backends
from sage_kv_connector.backends.base import Segments
from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.console import bytes_text, progress
from sage_kv_connector.launch.store import store_process
from sage_kv_connector.store.arena import Arena
from sage_kv_connector.store.client import StoreClient


class BenchError(RuntimeError):
    """A page was not kept or did not come back."""


class _Pages:
    """Pages of one buffer in an order of their own."""

    def __init__(self, page_bytes: int, pages: int, seed: int, *, filled: bool) -> None:
        # Aligned to the machine's pages, as an engine's host pool is: else the kernel's own copies get much slower.
        room = np.zeros(pages * page_bytes + mmap.PAGESIZE, dtype=np.uint8)
        start = -int(room.ctypes.data) % mmap.PAGESIZE
        self.data = room[start : start + pages * page_bytes].reshape(pages, page_bytes)
        if filled:
            self.data[:] = np.random.default_rng(seed).integers(0, 256, self.data.shape, dtype=np.uint8)
        self.order = np.random.default_rng(seed).permutation(pages)

    @property
    def extent(self) -> tuple[int, int]:
        return int(self.data.ctypes.data), self.data.nbytes

    def items(self) -> Sequence[Segments]:
        base, page_bytes = int(self.data.ctypes.data), self.data.shape[1]
        return [np.array([[base + int(at) * page_bytes, page_bytes]], dtype=np.uint64) for at in self.order]


def bench_store(page_bytes: int, pages: int, repeats: int) -> dict[str, Any]:
    """Run it. Raises BenchError, and RuntimeError if no store starts."""
    source = _Pages(page_bytes, pages, 1, filled=True)
    target = _Pages(page_bytes, pages, 2, filled=False)
    keys = [f"page {i}" for i in range(pages)]
    total = page_bytes * pages
    rounds: list[dict[str, float]] = []
    verified = True
    with ExitStack() as stack:
        store = stack.enter_context(store_process(str(2 * pages * Arena.rounded(page_bytes))))
        clients: dict[str, StoreClient] = {}
        for backend in host_backends():
            config = KVTransportConfig.load({"backend": backend, "host": "127.0.0.1"})
            client = clients[backend] = StoreClient([store.address(backend)], config, deadline_s=60.0)
            stack.callback(client.close)
            client.register_memory([source.extent, target.extent])
        for number in range(repeats + 1):
            begun = time.monotonic()
            figures = {"memcpy": _timed(total, partial(_copy, source, target))}
            for backend, client in clients.items():
                if not client.clear():
                    raise BenchError("the store was not cleared")
                target.data[:] = 0
                figures[f"{backend}_put"] = _timed(total, partial(_move, client.put, keys, source))
                figures[f"{backend}_get"] = _timed(total, partial(_move, client.get, keys, target))
                verified &= bool((target.data[target.order] == source.data[source.order]).all())
            if number:  # the first one warms up
                rounds.append(figures)
                progress.print(f"  round {number} of {repeats}: {time.monotonic() - begun:.1f} s")
    return {
        "page_bytes": page_bytes,
        "pages": pages,
        "total_bytes": total,
        "repeats": repeats,
        "verified": verified,
        "memcpy_gbytes_per_s": median(r["memcpy"] for r in rounds),
        **{
            backend: {
                f"{verb}_{name}": value
                for verb in ("put", "get")
                for name, value in (
                    ("gbytes_per_s", median(r[f"{backend}_{verb}"] for r in rounds)),
                    ("to_memcpy", median(r[f"{backend}_{verb}"] / r["memcpy"] for r in rounds)),
                )
            }
            for backend in host_backends()
        },
    }


def store_rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The result as a table for people."""
    yield "batch", f"{result['pages']} pages of {bytes_text(result['page_bytes'])}"
    yield "memcpy, one thread", f"{result['memcpy_gbytes_per_s']:.2f} GB/s"
    for backend in host_backends():
        one = result[backend]
        yield (
            backend,
            f"put {one['put_gbytes_per_s']:.2f} GB/s ({one['put_to_memcpy']:.2f} of memcpy), "
            f"get {one['get_gbytes_per_s']:.2f} GB/s ({one['get_to_memcpy']:.2f})",
        )
    yield "bytes equal", "yes" if result["verified"] else "NO"


def _copy(source: _Pages, target: _Pages) -> None:
    for to, at in zip(target.order, source.order, strict=True):
        target.data[to] = source.data[at]


def _move(move: Callable[..., list[bool]], keys: Sequence[str], pages: _Pages) -> None:
    moved = move(keys, pages.items())
    if not all(moved):
        raise BenchError(f"{move.__name__}: {moved.count(False)} of {len(keys)} pages did not go")


def _timed(nbytes: int, work: Callable[[], None]) -> float:
    """GB/s of ``work``."""
    begun = time.perf_counter()
    work()
    return nbytes / (time.perf_counter() - begun) / 1e9
