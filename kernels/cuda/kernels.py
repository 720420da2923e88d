# SPDX-License-Identifier: Apache-2.0
"""``DeviceKernels`` of CUDA and HIP: modules and launches through the driver's own interface."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import torch

from sage_kv_connector.format.wire_format import WireFormat
from sage_kv_connector.kernels.common.launch import (
    DATA_BYTES,
    LayerPlane,
    PlaneLayout,
    launch_argument,
    launch_plane,
    tile_count,
)
from sage_kv_connector.kernels.cuda.compiler import compiled, load_library
from sage_kv_connector.kernels.cuda.group import THREADS, shared_bytes
from sage_kv_connector.kernels.plane import KVPlane, Range
from sage_kv_connector.kernels.registry import KernelsUnavailable

#: Calls of the driver by what they do: CUDA's name, HIP's name.
CALLS = {
    "load": ("cuModuleLoadData", "hipModuleLoadData"),
    "function": ("cuModuleGetFunction", "hipModuleGetFunction"),
    "launch": ("cuLaunchKernel", "hipModuleLaunchKernel"),
}


class Kernels:
    """Kernels for torch's current CUDA (or ROCm) devices. Raises KernelsUnavailable where there are none."""

    def __init__(self, device_type: str) -> None:
        self.name = device_type
        self.hip = device_type == "hip"
        if not torch.cuda.is_available():
            raise KernelsUnavailable("torch sees no CUDA or ROCm device")
        if self.hip != bool(torch.version.hip):
            raise KernelsUnavailable(f"torch was built for {'ROCm' if torch.version.hip else 'CUDA'}")
        names = ("libamdhip64.so", "libgalaxyhip.so.5") if self.hip else ("libcuda.so.1",)
        self.driver = load_library(names)
        self._function = cache(self._find_function)

    def encode(self, plane: KVPlane, tokens: Range, heads: Range, fmt: WireFormat) -> torch.Tensor:
        plane.check(tokens, heads, fmt)
        size = plane.wire_bytes(tokens, heads, fmt)
        wire = torch.empty(size, dtype=torch.uint8, device=plane.pages.device)
        self._launch("encode", plane, wire, tokens, heads, fmt)
        return wire

    def decode(
        self, wire: torch.Tensor, plane: KVPlane, tokens: Range, heads: Range, fmt: WireFormat
    ) -> None:
        plane.check(tokens, heads, fmt)
        plane.check_wire(wire.numel(), tokens, heads, fmt)
        if wire.data_ptr() % 16 or not wire.is_contiguous():
            raise ValueError("wire must be contiguous and start at a multiple of 16 bytes")
        self._launch("decode", plane, wire, tokens, heads, fmt)

    def _launch(
        self, verb: str, plane: KVPlane, wire: torch.Tensor, tokens: Range, heads: Range, fmt: WireFormat
    ) -> None:
        pages = plane.pages
        page_tokens, dim = pages.shape[1], pages.shape[3]
        page_stride, *strides = pages.stride()
        token_stride, head_stride, dim_stride = strides
        layout = PlaneLayout(
            (head_stride, token_stride, dim_stride), page_stride * pages.element_size(), dim, fmt
        )
        last = -(-(tokens.first + tokens.length) // page_tokens)
        ids = np.asarray(plane.block_table[tokens.first // page_tokens : last], np.int32)
        layer = LayerPlane(pages.data_ptr(), plane.memory_scale, plane.wire_scale)
        address = 0
        if ids.nbytes + ctypes.sizeof(layer) > DATA_BYTES:
            held = torch.empty(ids.nbytes, dtype=torch.uint8, device=pages.device)
            host = torch.frombuffer(bytearray(ids.tobytes()), dtype=torch.uint8)
            held.copy_(host.pin_memory(), non_blocking=True)
            address = held.data_ptr()
        argument = launch_argument(
            [launch_plane(layout)], [layer], ids, address, wire=wire.data_ptr(), page_tokens=page_tokens,
            first_token=tokens.first, tokens=tokens.length, first_head=heads.first, heads=heads.length,
        )  # fmt: skip
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        with torch.cuda.device(pages.device):
            function = self._function(verb, plane.dtype, fmt.dtype, pages.device.index)
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            grid = (tile_count(tokens, heads, fmt), 1, 1)
            shared = shared_bytes(dim, fmt)
            self._call("launch", function, *grid, THREADS, 1, 1, shared, stream, arguments, None)

    def _find_function(self, verb: str, memory: str, wire: str, device: int) -> ctypes.c_void_p:
        properties = torch.cuda.get_device_properties(device)
        if self.hip:
            architecture = properties.gcnArchName.partition(":")[0]
        else:
            architecture = f"sm_{properties.major}{properties.minor}"
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("load", ctypes.byref(module), compiled(memory, wire, architecture))
        name = f"kv_{verb}_{memory}_{wire}".encode()
        self._call("function", ctypes.byref(function), module, name)
        return function

    def _call(self, what: str, *arguments: Any) -> None:
        name = CALLS[what][self.hip]
        status = getattr(self.driver, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name} returned {status}")
