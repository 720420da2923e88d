# SPDX-License-Identifier: Apache-2.0
"""How fast a device's kernels convert, against a copy inside the device; by the runtime that the engine uses.

GB/s are bytes read plus bytes written, of both, so 1.0 of the copy is the memory's own limit. Every wire and every page
is compared with what the CPU's kernels make.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from sage_kv_connector.bench.device_cache import AXES, CacheShape, DeviceTensor
from sage_kv_connector.bench.device_golden import function_of
from sage_kv_connector.contract.cache_view import strided_planes
from sage_kv_connector.devices.runtime import CopyKind, DeviceRuntime, Launch
from sage_kv_connector.format.converter import ConvertedPlane, GroupConverter, Span
from sage_kv_connector.format.reference import from_float
from sage_kv_connector.format.wire_format import WireFormat
from sage_kv_connector.kernels.registry import PagedGroup, kernel_sources

#: K's and V's.
FORMATS = {
    "bf16": (WireFormat("bf16"), WireFormat("bf16")),
    "fp8_e4m3 by token": (WireFormat("fp8_e4m3", "token"),) * 2,
    "fp8_e4m3 by channel": (WireFormat("fp8_e4m3", "channel"),) * 2,
    "int4": (WireFormat("int4", "channel", zero_point=True), WireFormat("int4", "token", zero_point=True)),
}


class _Bench:
    """A cache of bf16 on the device, and room for its wire and a copy of it."""

    def __init__(self, runtime: DeviceRuntime, device: int, shape: CacheShape) -> None:
        self.runtime, self.device, self.shape = runtime, device, shape
        self.nbytes = shape.layers * shape.layer_bytes
        self.cache, self.other, self.wire = (runtime.alloc(device, self.nbytes + (1 << 20)) for _ in range(3))
        self.host = runtime.host_alloc(device, self.nbytes + (1 << 20))
        self.stream = runtime.stream_create(device)
        self.sources = kernel_sources(runtime.vendor)
        self.architecture = runtime.architecture(device)
        self.function = function_of(runtime, device, self.sources)
        pages = shape.of_layer[0]
        self.span = Span(
            0,
            shape.layers,
            0,
            shape.heads,
            0,
            shape.tokens,
            np.random.default_rng(3).permutation(pages).tolist(),
        )
        values = np.random.default_rng(5).normal(size=self.nbytes // 2).astype(np.float32)
        self.content = from_float(values, "bf16").astype(np.uint16)
        self.move(self.cache, self.content.view(np.uint8))

    def planes(self, base: int, formats: tuple[WireFormat, ...]) -> list[ConvertedPlane]:
        shape = self.shape
        bases = [base + layer * shape.layer_bytes for layer in range(shape.layers)]
        found = strided_planes("kv", DeviceTensor(base, shape.of_layer), AXES)
        page = shape.layer_bytes // shape.of_layer[0]
        ones = [1.0] * shape.layers
        return [
            ConvertedPlane(one.order, page, one.dim, fmt, bases, ones, ones)
            for one, fmt in zip(found, formats, strict=True)
        ]

    def group(self, base: int, formats: tuple[WireFormat, ...]) -> PagedGroup:
        shape = self.shape
        return PagedGroup("bf16", shape.page, shape.of_layer[0], shape.heads, self.planes(base, formats))

    def launched(self, launches: list[Launch]) -> Callable[[], None]:
        def run() -> None:
            for launch in launches:
                self.runtime.launch(self.device, launch, self.stream)

        return run

    def copied(self, nbytes: int) -> Callable[[], None]:
        ends = (self.other, self.cache)
        kind = CopyKind.DEVICE_TO_DEVICE
        return lambda: self.runtime.copy_async(self.device, *ends, nbytes, kind, self.stream)

    def seconds(self, run: Callable[[], None], times: int) -> float:
        """Of one run, where ``times`` of them are queued together."""
        begun = time.perf_counter()
        for _ in range(times):
            run()
        self.runtime.stream_synchronize(self.device, self.stream)
        return (time.perf_counter() - begun) / times

    def move(self, device_address: int, content: np.ndarray) -> None:
        self.seen(len(content))[:] = content
        self._copy(device_address, self.host, len(content), CopyKind.HOST_TO_DEVICE)

    def read(self, device_address: int, nbytes: int) -> np.ndarray:
        """Valid until the next ``move`` or ``read``."""
        self._copy(self.host, device_address, nbytes, CopyKind.DEVICE_TO_HOST)
        return self.seen(nbytes)

    def seen(self, nbytes: int) -> np.ndarray:
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self.host))

    def _copy(self, destination: int, source: int, nbytes: int, kind: CopyKind) -> None:
        self.runtime.copy_async(self.device, destination, source, nbytes, kind, self.stream)
        self.runtime.stream_synchronize(self.device, self.stream)

    def close(self) -> None:
        self.runtime.stream_destroy(self.device, self.stream)
        for address in (self.cache, self.other, self.wire):
            self.runtime.free(self.device, address)
        self.runtime.host_free(self.device, self.host)


def bench_kernels(
    runtime: DeviceRuntime, device: int, tokens: int, layers: int, repeats: int, queued: int = 10
) -> dict[str, Any]:
    """``results``: a row for each format and verb. Medians of ``repeats`` turns, each of ``queued`` launches together.

    Raises DeviceError, KernelsUnavailable.
    """
    bench = _Bench(runtime, device, CacheShape(tokens, layers, 16))
    try:
        rows = [
            row for name, formats in FORMATS.items() for row in _rows(bench, name, formats, repeats, queued)
        ]
    finally:
        bench.close()
    return {
        "runtime": runtime.api,
        "emulated": runtime.emulated,
        "device": runtime.device_info(device).name,
        "architecture": bench.architecture,
        "kv_bytes": bench.nbytes,
        "results": rows,
        "verified": all(row["bit_identical"] for row in rows),
    }


def kernel_rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The result as a table for people."""
    note = " (emulated: its speed is the CPU's)" if result["emulated"] else ""
    yield "device", f"{result['device']}, {result['architecture']}, {result['runtime']}{note}"
    for row in result["results"]:
        yield (
            f"{row['verb']} {row['format']}",
            f"{row['gbytes_per_s']:.1f} GB/s, copy {row['copy_gbytes_per_s']:.1f}, ratio {row['of_copy']:.2f}, "
            f"{'equal' if row['bit_identical'] else 'WRONG'}",
        )


def _rows(
    bench: _Bench, name: str, formats: tuple[WireFormat, ...], repeats: int, queued: int
) -> Iterator[dict[str, Any]]:
    host = np.copy(bench.content)
    converter = GroupConverter(*bench.group(host.ctypes.data, formats))
    nbytes = converter.wire_bytes(bench.span)
    wire = np.empty(nbytes, dtype=np.uint8)
    converter.encode(bench.span, wire.ctypes.data, nbytes)
    kernels = bench.sources.group(bench.group(bench.cache, formats), bench.function)
    back = bench.sources.group(bench.group(bench.other, formats), bench.function)
    encode = bench.launched([*kernels.launches("encode", bench.span, bench.wire, nbytes)])
    decode = bench.launched([*back.launches("decode", bench.span, bench.wire, nbytes)])
    encode()
    right = {"encode": bool(np.array_equal(bench.read(bench.wire, nbytes), wire))}
    converter.decode(bench.span, wire.ctypes.data, nbytes)
    decode()
    right["decode"] = bool(np.array_equal(bench.read(bench.other, bench.nbytes), host.view(np.uint8)))
    runs = {"encode": encode, "decode": decode, "copy": bench.copied(bench.nbytes)}
    times: dict[str, list[float]] = {verb: [] for verb in runs}
    for _ in range(repeats):
        for verb, run in runs.items():
            times[verb].append(bench.seconds(run, queued))
    speeds = {
        verb: (2 * bench.nbytes if verb == "copy" else bench.nbytes + nbytes) / statistics.median(each) / 1e9
        for verb, each in times.items()
    }
    for verb in ("encode", "decode"):
        yield {
            "format": name, "verb": verb, "gbytes_per_s": speeds[verb], "copy_gbytes_per_s": speeds["copy"],
            "of_copy": speeds[verb] / speeds["copy"], "bit_identical": right[verb],
        }  # fmt: skip
