# SPDX-License-Identifier: Apache-2.0
"""A device's kernels on a few pages, before any KV is trusted to them: they must make what the CPU's make."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from sage_kv_connector.contract.dtypes import DTYPE_BITS
from sage_kv_connector.contract.element_order import strided
from sage_kv_connector.devices.runtime import CopyKind, DeviceError, DeviceRuntime, Launch
from sage_kv_connector.format.converter import ConvertedPlane, GroupConverter, Span
from sage_kv_connector.format.defaults import default_format
from sage_kv_connector.format.reference import from_float
from sage_kv_connector.kernels.registry import KernelSources, PagedGroup

PAGES, TOKENS, HEADS, DIM = 5, 16, 2, 64
#: A box with ragged ends, its pages in any order.
SPAN = Span(0, 1, 0, HEADS, 5, 40, [3, 0, 4])
U8 = npt.NDArray[np.uint8]


class KernelTrial:
    """Memory for it, until ``close``. Construction and ``differs`` raise DeviceError."""

    def __init__(self, runtime: DeviceRuntime, device: int, dtype: str) -> None:
        self._runtime, self._device, self._dtype = runtime, device, dtype
        item = DTYPE_BITS[dtype] // 8
        self._row = 2 * DIM * item
        self._nbytes = PAGES * HEADS * TOKENS * self._row
        room = 2 * self._nbytes + (1 << 16)  # scales are more than a dtype's worth on the smallest wires
        self._pages, self._wire = runtime.alloc(device, room), runtime.alloc(device, room)
        self._host = runtime.host_alloc(device, room)
        self._stream = runtime.stream_create(device)
        values = np.random.default_rng(7).normal(size=self._nbytes // item).astype(np.float32)
        self._content = np.ascontiguousarray(from_float(values, dtype)).view(np.uint8)

    def differs(
        self, sources: KernelSources, function: Callable[[str, str, str], int], wire_dtype: str
    ) -> str:
        """What of ``wire_dtype`` the kernels make otherwise than the CPU, "" if nothing. Raises ValueError for
        formats that they lack."""
        host = self._content.copy()
        converter = GroupConverter(*self._group(int(host.ctypes.data), wire_dtype))
        nbytes = converter.wire_bytes(SPAN)
        memory = np.empty(nbytes + 16, dtype=np.uint8)
        wire = memory[-memory.ctypes.data % 16 :][:nbytes]
        converter.encode(SPAN, int(wire.ctypes.data), nbytes)
        kernels = sources.group(self._group(self._pages, wire_dtype), function)
        made = self._run(
            kernels.launches("encode", SPAN, self._wire, nbytes), self._content, nbytes, encode=True
        )
        if not np.array_equal(made, wire):
            return f"{np.count_nonzero(made != wire)} bytes of {nbytes} of an encoded wire"
        host[:] = 0
        converter.decode(SPAN, int(wire.ctypes.data), nbytes)
        launches = kernels.launches("decode", SPAN, self._wire, nbytes)
        pages = self._run(launches, wire, self._nbytes, encode=False)
        if not np.array_equal(pages, host):
            return f"{np.count_nonzero(pages != host)} bytes of {self._nbytes} of decoded pages"
        return ""

    def close(self) -> None:
        runtime, device = self._runtime, self._device
        for give_back, what in (
            (runtime.stream_synchronize, self._stream),  # a launch that failed may have left copies on it
            (runtime.stream_destroy, self._stream),
            (runtime.free, self._pages),
            (runtime.free, self._wire),
            (runtime.host_free, self._host),
        ):
            with contextlib.suppress(DeviceError):
                give_back(device, what)

    def _group(self, base: int, wire_dtype: str) -> PagedGroup:
        item = DTYPE_BITS[self._dtype] // 8
        page = HEADS * TOKENS * self._row
        planes = [
            ConvertedPlane(
                strided(number * DIM * item, TOKENS * self._row, self._row, item),
                page, DIM, default_format(wire_dtype, name), [base], [1.0], [1.0],
            )
            for number, name in enumerate("kv")
        ]  # fmt: skip
        return PagedGroup(self._dtype, TOKENS, PAGES, HEADS, planes)

    def _run(self, launches: Sequence[Launch], given: U8, nbytes: int, *, encode: bool) -> U8:
        runtime, device, stream = self._runtime, self._device, self._stream
        source, target = (self._pages, self._wire) if encode else (self._wire, self._pages)
        seen = np.ctypeslib.as_array((ctypes.c_uint8 * max(len(given), nbytes)).from_address(self._host))
        if not encode:  # pages that are not written must stay as they are
            seen[:nbytes] = 0
            runtime.copy_async(device, target, self._host, nbytes, CopyKind.HOST_TO_DEVICE, stream)
            runtime.stream_synchronize(device, stream)
        seen[: len(given)] = given
        runtime.copy_async(device, source, self._host, len(given), CopyKind.HOST_TO_DEVICE, stream)
        for launch in launches:
            runtime.launch(device, launch, stream)
        runtime.copy_async(device, self._host, target, nbytes, CopyKind.DEVICE_TO_HOST, stream)
        runtime.stream_synchronize(device, stream)
        return seen[:nbytes].copy()
