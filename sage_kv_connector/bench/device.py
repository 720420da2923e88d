# SPDX-License-Identifier: Apache-2.0
"""How fast pages go between a device and pinned memory by our lanes, against one plain copy of as many bytes.

Both through the same runtime, in one process, turn by turn, medians of the turns. The plain copy
is a single asynchronous copy of everything: what the vendor's runtime and the link can do.
"""

from __future__ import annotations

import ctypes
import statistics
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from sage_kv_connector.devices.dma_lane import DmaLane
from sage_kv_connector.devices.runtime import Copies, CopyKind, DeviceRuntime

#: Bytes of one job of a lane, as in a transfer's parts.
JOB_BYTES = 4 << 20
TIMEOUT_S = 120.0
WAYS = {"d2h": CopyKind.DEVICE_TO_HOST, "h2d": CopyKind.HOST_TO_DEVICE}


def bench_device(
    runtime: DeviceRuntime, device: int, page_bytes: int, total_bytes: int, repeats: int
) -> dict[str, Any]:
    """Shuffled pages on the device, in order in pinned memory. Raises DeviceError."""
    pages = max(1, total_bytes // page_bytes)
    nbytes = pages * page_bytes
    on_device = runtime.alloc(device, nbytes)
    on_host = runtime.host_alloc(device, nbytes)
    stream = runtime.stream_create(device)
    host = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(on_host))
    order = np.random.default_rng(3).permutation(pages).astype(np.uint64)
    result: dict[str, Any] = {
        "runtime": runtime.api,
        "emulated": runtime.emulated,
        "device": runtime.device_info(device).name,
        "page_bytes": page_bytes,
        "total_bytes": nbytes,
        "batched_copies": runtime.features.batched_copies,
    }
    try:
        verified = True
        for name, kind in WAYS.items():
            table = _table(kind, on_device, on_host, order, page_bytes)
            lane = _Lane(runtime, device, kind)
            try:
                begun: dict[str, list[float]] = {"ours": [], "plain": []}
                for turn in range(repeats + 1):
                    ours = _timed(lambda lane=lane, table=table: lane.move(table))
                    ends = (on_host, on_device) if name == "d2h" else (on_device, on_host)

                    def plain(ends: tuple[int, int] = ends, kind: CopyKind = kind) -> None:
                        runtime.copy_async(device, *ends, nbytes, kind, stream)
                        runtime.stream_synchronize(device, stream)

                    alone = _timed(plain)
                    if turn:  # the first warms up
                        begun["ours"].append(ours)
                        begun["plain"].append(alone)
            finally:
                lane.close()
            speeds = {which: nbytes / statistics.median(times) / 1e9 for which, times in begun.items()}
            result[name] = {
                "gbytes_per_s": speeds["ours"],
                "plain_copy_gbytes_per_s": speeds["plain"],
                "ratio": speeds["ours"] / speeds["plain"],
            }
        verified = _verify(runtime, device, host, on_device, order, page_bytes)
        result["verified"] = verified
    finally:
        runtime.stream_destroy(device, stream)
        runtime.host_free(device, on_host)
        runtime.free(device, on_device)
    return result


def device_rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The result as a table for people."""
    yield "runtime", f"{result['runtime']}, {result['device']}"
    yield "pages", f"{result['total_bytes'] >> 20} MiB in pages of {result['page_bytes']} bytes"
    for name in WAYS:
        one = result[name]
        yield (
            name,
            f"{one['gbytes_per_s']:.2f} GB/s, plain copy {one['plain_copy_gbytes_per_s']:.2f} GB/s, "
            f"ratio {one['ratio']:.2f}",
        )
    yield "bytes", "equal" if result["verified"] else "WRONG"


class _Lane:
    """A lane whose jobs are waited for together."""

    def __init__(self, runtime: DeviceRuntime, device: int, kind: CopyKind) -> None:
        self._lane = DmaLane(runtime, device, kind, self._ended)
        self._open = 0
        self._errors: list[str] = []
        self._all = threading.Condition()

    def move(self, table: Copies) -> None:
        """Raises RuntimeError with the vendor's error."""
        rows = max(1, JOB_BYTES // int(table[0, 2]))
        jobs = [table[at : at + rows] for at in range(0, len(table), rows)]
        with self._all:
            self._open = len(jobs)
        for number, job in enumerate(jobs):
            self._lane.submit(number, job)
        with self._all:
            if not self._all.wait_for(lambda: self._open == 0, TIMEOUT_S):
                raise RuntimeError(f"copies did not end within {TIMEOUT_S:.0f} s")
        if self._errors:
            raise RuntimeError(self._errors[0])

    def close(self) -> None:
        self._lane.close()

    def _ended(self, job: int, error: str) -> None:
        with self._all:
            if error:
                self._errors.append(error)
            self._open -= 1
            self._all.notify_all()


def _table(kind: CopyKind, on_device: int, on_host: int, order: npt.NDArray[np.uint64], page: int) -> Copies:
    there = np.uint64(on_device) + order * np.uint64(page)
    here = np.uint64(on_host) + np.arange(len(order), dtype=np.uint64) * np.uint64(page)
    ends = (here, there) if kind == CopyKind.DEVICE_TO_HOST else (there, here)
    return np.stack([*ends, np.full(len(order), page, dtype=np.uint64)], axis=1)


def _timed(run: Any) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def _verify(
    runtime: DeviceRuntime,
    device: int,
    host: npt.NDArray[np.uint8],
    on_device: int,
    order: npt.NDArray[np.uint64],
    page: int,
) -> bool:
    """Random bytes to the device's shuffled pages and back in the pages' own order."""
    content = np.random.default_rng(5).integers(0, 256, len(host), dtype=np.uint8)
    host[:] = content
    writer = _Lane(runtime, device, CopyKind.HOST_TO_DEVICE)
    reader = _Lane(runtime, device, CopyKind.DEVICE_TO_HOST)
    try:
        address = int(host.ctypes.data)
        writer.move(_table(CopyKind.HOST_TO_DEVICE, on_device, address, order, page))
        host[:] = 0
        straight = np.arange(len(order), dtype=np.uint64)
        reader.move(_table(CopyKind.DEVICE_TO_HOST, on_device, address, straight, page))
    finally:
        writer.close()
        reader.close()
    landed = host.reshape(len(order), page)[order.astype(np.int64)].reshape(-1)
    return bool(np.array_equal(landed, content))
