# SPDX-License-Identifier: Apache-2.0
"""A converting side whose cache lies on an emulated device."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sage_kv_connector.devices.runtime import DeviceMemory
from sage_kv_connector.engine.core import EngineCore
from tests.engine.converting_side import ConvertingSide, Shape
from tests.vendors.rig import Rig

VENDOR = os.environ.get("SAGE_KVT_TEST_VENDOR", "ascend")


class DeviceTensor(NamedTuple):
    """Bytes on a device, as a view of a cache takes them."""

    address: int
    shape: tuple[int, ...]

    def data_ptr(self) -> int:
        return self.address

    def stride(self) -> tuple[int, ...]:
        return (self.shape[1], 1)

    def element_size(self) -> int:
        return 1


class DeviceSide(ConvertingSide):
    """``cache`` is a copy on the host; ``upload`` and ``download`` move all of it."""

    memory = "device"

    def __init__(
        self, make_core: Callable[..., EngineCore], shape: Shape, pages: int, rig: Rig, **options: Any
    ) -> None:
        self.rig = rig
        self.tensors: list[DeviceTensor] = []
        super().__init__(make_core, shape, pages, **options)

    def place(self) -> Sequence[Any]:
        for layer in self.cache:
            pinned = self.rig.pinned(layer.nbytes)
            pinned[:] = layer.reshape(-1)
            address = self.rig.upload(pinned)
            self.tensors.append(DeviceTensor(address, layer.shape))
        return self.tensors

    def device(self) -> DeviceMemory:
        return DeviceMemory(self.rig.runtime, 0)

    def upload(self) -> None:
        for layer, tensor in zip(self.cache, self.tensors, strict=True):
            pinned = self.rig.pinned(layer.nbytes)
            pinned[:] = layer.reshape(-1)
            self._copy(tensor.address, pinned, upload=True)

    def download(self) -> None:
        for layer, tensor in zip(self.cache, self.tensors, strict=True):
            pinned = self.rig.pinned(layer.nbytes)
            self._copy(tensor.address, pinned, upload=False)
            layer[:] = pinned.reshape(layer.shape)

    def _copy(self, address: int, pinned: npt.NDArray[np.uint8], *, upload: bool) -> None:
        from tests.vendors.rig import D2H, H2D

        runtime = self.rig.runtime
        stream = runtime.stream_create(0)
        ends = (address, pinned.ctypes.data) if upload else (pinned.ctypes.data, address)
        runtime.copy_async(0, *ends, len(pinned), H2D if upload else D2H, stream)
        runtime.stream_synchronize(0, stream)
        runtime.stream_destroy(0, stream)
