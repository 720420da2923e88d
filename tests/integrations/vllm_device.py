# SPDX-License-Identifier: Apache-2.0
"""vLLM workers with caches of any layout, in host memory or on an emulated device, where a tensor is an address."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from vllm.platforms import current_platform

from sage_kv_connector.devices.runtime import DeviceMemory
from sage_kv_connector.integrations.common.compute_events import ComputeEvents
from sage_kv_connector.integrations.vllm import registered
from tests.engine.watched_runtime import Event
from tests.integrations.vllm_layouts import Layout
from tests.integrations.vllm_workers import BLOCKS, Worker, cache_config
from tests.vendors.rig import Rig


class OnDevice:
    """A tensor as the connector sees it. ``host``: one of the same shape and strides, over the memory at ``base()``."""

    device = torch.device("cuda", 0)

    def __init__(self, host: torch.Tensor, base: Callable[[], int]) -> None:
        self._host, self._base = host, base

    def data_ptr(self) -> int:
        return self._base() + int(self._host.storage_offset()) * int(self._host.element_size())

    def __getattr__(self, name: str) -> Any:
        if name not in ("shape", "stride", "element_size", "dim"):
            raise AttributeError(f"a tensor on a device is asked for {name}")
        return getattr(self._host, name)


class LayoutWorker(Worker):
    """A worker with a cache of some layout in host memory."""

    def __init__(self, name: str, seed: int, backend: str, layout: Layout, **more: Any) -> None:
        self.layout = layout
        specs = {layer: spec for group in layout.groups for layer, spec in group.items()}
        groups = cache_config(*((group, next(iter(group.values()))) for group in layout.groups))
        super().__init__(name, seed, backend, specs=specs, groups=groups, cache_dtype=layout.dtype, **more)

    def made(self, specs: dict[str, Any], seed: int) -> dict[str, Any]:
        self.cache = self.layout.make(specs)
        self.cache.fill(seed)
        return self.cache.layers

    def download(self) -> None:
        """Let ``cache`` be what the pages hold."""

    def rows(self, ids: list[int]) -> list[npt.NDArray[np.uint8]]:
        """Of each layer the tokens of these pages, whichever way it lies in memory; shape (tokens, bytes)."""
        self.download()
        found = []
        for layer in self.cache.layers:
            rows = self.cache.rows(layer)
            pages = rows.reshape(BLOCKS, len(rows) // BLOCKS, -1)[ids]
            found.append(pages.reshape(-1, pages.shape[-1]))
        return found

    def pages(self, ids: list[int]) -> list[bytes]:
        return [bytes(one.tobytes()) for one in self.rows(ids)]


class DeviceWorker(LayoutWorker):
    """``cache`` is a copy on the host: ``upload`` and ``download`` move all of it."""

    def __init__(self, name: str, seed: int, backend: str, layout: Layout, rig: Rig, **more: Any) -> None:
        self.rig = rig
        super().__init__(name, seed, backend, layout, **more)

    def made(self, specs: dict[str, Any], seed: int) -> dict[str, Any]:
        layers = super().made(specs, seed)
        self.map_again()
        return layers

    def map_again(self) -> None:
        """The tensors get memory, which holds what ``cache`` does. An emulator can't choose where."""
        self.addresses = [self.rig.runtime.alloc(0, len(one)) for one in self.cache.memory]
        self.upload()

    def given(self) -> dict[str, Any]:
        places = {one.untyped_storage().data_ptr(): i for i, one in enumerate(self.cache.memory)}

        def on_device(host: Any) -> Any:
            if isinstance(host, tuple | list):
                return type(host)([on_device(one) for one in host])
            place = places[host.untyped_storage().data_ptr()]
            return OnDevice(host, lambda: self.addresses[place])

        return {name: on_device(one) for name, one in self.cache.layers.items()}

    def upload(self) -> None:
        for one, address in zip(self.cache.memory, self.addresses, strict=True):
            pinned = self.rig.pinned(len(one))
            pinned[:] = one.numpy()
            self.rig.write(address, pinned)

    def download(self) -> None:
        for one, address in zip(self.cache.memory, self.addresses, strict=True):
            one.copy_(torch.from_numpy(self.rig.download(address, len(one)).copy()))


def put_on(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the connector find the emulated device behind ``OnDevice`` tensors, and no CPU's packed order."""
    stream = rig.runtime.stream_create(0)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(registered, "open_device", lambda device: DeviceMemory(rig.runtime, 0))
    monkeypatch.setattr(
        registered, "compute_events", lambda device: ComputeEvents(lambda: Event(rig.runtime, stream))
    )
