# SPDX-License-Identifier: Apache-2.0
"""The golden vectors through a device's kernels, by the runtime that the engine uses."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from sage_kv_connector.contract.dtypes import DTYPE_BITS, WIRE_DTYPES
from sage_kv_connector.contract.element_order import strided
from sage_kv_connector.devices.runtime import CopyKind, DeviceRuntime
from sage_kv_connector.format.converter import ConvertedPlane, Span
from sage_kv_connector.kernels.golden import GoldenVector, golden_vectors
from sage_kv_connector.kernels.registry import GroupKernels, KernelSources, PagedGroup, kernel_sources

U8 = npt.NDArray[np.uint8]
ROOM = 1 << 20


def function_of(
    runtime: DeviceRuntime, device: int, sources: KernelSources
) -> Callable[[str, str, str], int]:
    """Handles of a device's kernels by verb, memory dtype and wire dtype; compiled and loaded when asked for."""
    architecture = runtime.architecture(device)

    def function(verb: str, memory: str, wire: str) -> int:
        code = sources.compiled(memory, wire, architecture)
        return runtime.load_function(device, code, f"kv_{verb}_{memory}_{wire}")

    return function


class _OnDevice:
    def __init__(self, runtime: DeviceRuntime, device: int) -> None:
        self.runtime, self.device = runtime, device
        self.sources = kernel_sources(runtime.vendor)
        self.function = function_of(runtime, device, self.sources)
        self.memory, self.wire = runtime.alloc(device, ROOM), runtime.alloc(device, ROOM)
        self.host = runtime.host_alloc(device, ROOM)
        self.stream = runtime.stream_create(device)

    def convert(
        self, verb: str, vector: GoldenVector, dtype: str, given: U8, nbytes: int, wire_bytes: int
    ) -> U8:
        """What ``verb`` makes of ``given`` (a page, or a wire): ``nbytes`` of it."""
        span = Span(0, 1, 0, 1, 0, len(vector.memory), [0])
        launches = self._group(vector, dtype).launches(verb, span, self.wire, wire_bytes)
        source, target = (self.memory, self.wire) if verb == "encode" else (self.wire, self.memory)
        seen = np.ctypeslib.as_array((ctypes.c_uint8 * ROOM).from_address(self.host))
        seen[: len(given)] = given
        runtime, device, stream = self.runtime, self.device, self.stream
        runtime.copy_async(device, source, self.host, len(given), CopyKind.HOST_TO_DEVICE, stream)
        for launch in launches:
            runtime.launch(device, launch, stream)
        runtime.copy_async(device, self.host, target, nbytes, CopyKind.DEVICE_TO_HOST, stream)
        runtime.stream_synchronize(device, stream)
        return seen[:nbytes].copy()

    def _group(self, vector: GoldenVector, dtype: str) -> GroupKernels:
        tokens, dim = vector.memory.shape
        item = DTYPE_BITS[dtype] // 8
        order = strided(0, tokens * dim * item, dim * item, item)
        plane = ConvertedPlane(
            order, tokens * dim * item, dim, vector.format, [self.memory], [1.0], [vector.tensor_scale]
        )
        return self.sources.group(PagedGroup(dtype, tokens, 1, 1, [plane]), self.function)

    def close(self) -> None:
        self.runtime.stream_destroy(self.device, self.stream)
        self.runtime.free(self.device, self.memory)
        self.runtime.free(self.device, self.wire)
        self.runtime.host_free(self.device, self.host)


def golden_differences(
    runtime: DeviceRuntime,
    device: int,
    memory_dtypes: Sequence[str],
    wire_dtypes: Sequence[str] = WIRE_DTYPES,
) -> Iterator[str]:
    """Each vector that comes out otherwise, and last how many were tried ("N checked").

    ``memory_dtypes``: of pages; with each wire dtype two kernels are compiled. Raises DeviceError, KernelsUnavailable.
    """
    on_device = _OnDevice(runtime, device)
    checked = 0
    try:
        for wire in wire_dtypes:
            for vector in golden_vectors(wire):
                tile = np.frombuffer(vector.tile, np.uint8)
                if vector.dtype in memory_dtypes:
                    made = on_device.convert(
                        "encode", vector, vector.dtype, _bytes(vector.memory), len(tile), len(tile)
                    )
                    checked += 1
                    if not np.array_equal(made, tile):
                        yield f"{vector.name}: encoded from {vector.dtype}"
                for dtype in memory_dtypes:
                    expected = _bytes(vector.decoded[dtype])
                    made = on_device.convert("decode", vector, dtype, tile, len(expected), len(tile))
                    checked += 1
                    if not np.array_equal(made, expected):
                        yield f"{vector.name}: decoded to {dtype}"
    finally:
        on_device.close()
    yield f"{checked} checked"


def _bytes(array: npt.NDArray[np.generic]) -> U8:
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1)
