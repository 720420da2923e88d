# SPDX-License-Identifier: Apache-2.0
"""An engine whose KV cache lies on a device, real or emulated: one side of a hand-over between two processes."""

from __future__ import annotations

import ctypes
import queue
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.cache_view import GroupView, KVCacheView, group_view, strided_planes
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.devices.runtime import CopyKind, DeviceMemory, DeviceRuntime
from sage_kv_connector.engine import EngineCore, PagedSource, PagesTarget, Wanted
from sage_kv_connector.engine.conversion.wire_plan import SAME, group_converter, plan_wire, planned_wire_dtype
from sage_kv_connector.engine.pages.target import one_run
from sage_kv_connector.format.converter import Span
from sage_kv_connector.format.reference import from_float
from sage_kv_connector.vendors import open_runtime
from sage_kv_connector.vendors.emulator import EmulatorSettings
from sage_kv_connector.vendors.emulator.control import control_of

#: vLLM's: a token's K and V side by side, heads outside of tokens.
AXES = ("page", "head", "token", "content")
#: Of the emulated device beside the cache.
ROOM_BYTES = 256 << 20
TIMEOUT_S = 300.0
U16 = npt.NDArray[np.uint16]


class CacheShape(NamedTuple):
    """``page`` tokens a page; bf16."""

    tokens: int
    layers: int
    page: int
    heads: int = 8
    dim: int = 128

    @property
    def of_layer(self) -> tuple[int, int, int, int]:
        return (self.tokens // self.page, self.heads, self.page, 2 * self.dim)

    @property
    def layer_bytes(self) -> int:
        return 2 * int(np.prod(self.of_layer))


class DeviceTensor(NamedTuple):
    """Contiguous elements of two bytes on a device, as an engine's tensor says where they are."""

    address: int
    shape: tuple[int, ...]

    def data_ptr(self) -> int:
        return self.address

    def stride(self) -> tuple[int, ...]:
        return tuple(int(np.prod(self.shape[axis + 1 :])) for axis in range(len(self.shape)))

    def element_size(self) -> int:
        return 2


class DeviceCache:
    """Device 0 with the cache and the engine over it; ``emulated``: of a machine of its own."""

    def __init__(
        self, vendor: str, shape: CacheShape, config: dict[str, Any], role: str, *, emulated: bool
    ) -> None:
        self.shape = shape
        nbytes = shape.layers * shape.layer_bytes + ROOM_BYTES
        settings = EmulatorSettings(devices=1, memory_bytes=nbytes) if emulated else None
        self.runtime: DeviceRuntime = open_runtime(vendor, settings)
        self._layers = [self.runtime.alloc(0, shape.layer_bytes) for _ in range(shape.layers)]
        self.group = _group(shape, [DeviceTensor(at, shape.of_layer) for at in self._layers])
        self.schema = _schema(shape, self.group, "device")
        self.view = KVCacheView((self.group,))
        self.core = EngineCore(
            KVTransportConfig.load(config), schema=self.schema, device=DeviceMemory(self.runtime, 0)
        )
        self.core.register_memory(self.view.extents())
        self.core.start()
        self.table = page_table(shape, role)
        self._host = self._pinned()

    def counts(self) -> dict[str, dict[str, int]]:
        """By direction what the machine was asked for, and how many parts were staged, or read in place (d2d)."""
        asked = {way: each._asdict() for way, each in control_of(self.runtime).counts().items()}
        counters = self.core.counters()
        jobs = {"d2h": "d2h_jobs", "h2d": "h2d_jobs", "d2d": "d2d_reads"}
        parts = {way: counters.get(name, 0) for way, name in jobs.items()}
        return asked | {"parts": parts, "launches": {"all": control_of(self.runtime).launches()}}

    def write(self, layer: int, content: U16) -> None:
        self._host[:] = content
        self._move(self._layers[layer], self._host.ctypes.data, CopyKind.HOST_TO_DEVICE)

    def read(self, layer: int) -> U16:
        """Valid until the next ``read`` or ``write``."""
        self._move(self._host.ctypes.data, self._layers[layer], CopyKind.DEVICE_TO_HOST)
        return self._host

    def copy_seconds(self, kind: CopyKind, nbytes: int) -> float:
        """Of one plain copy of so many bytes, between the device and pinned memory or inside the device."""
        runtime = self.runtime
        on_device = (kind != CopyKind.DEVICE_TO_HOST, kind != CopyKind.HOST_TO_DEVICE)
        ends = [(runtime.alloc if there else runtime.host_alloc)(0, nbytes) for there in on_device]
        stream = runtime.stream_create(0)
        times = []
        for _ in range(4):
            begun = time.perf_counter()
            runtime.copy_async(0, ends[0], ends[1], nbytes, kind, stream)
            runtime.stream_synchronize(0, stream)
            times.append(time.perf_counter() - begun)
        runtime.stream_destroy(0, stream)
        for address, there in zip(ends, on_device, strict=True):
            (runtime.free if there else runtime.host_free)(0, address)
        return statistics.median(times[1:])

    def offer(self, transfer_id: str, released: queue.Queue[Outcome]) -> None:
        source = PagedSource(self.view)
        source.set_pages(0, self.table)
        source.advance(0, slice(None), len(self.table))
        self.core.offer(transfer_id, source, released.put)
        self.core.finish(transfer_id)

    def fetch(self, peer: PeerAddress, transfer_id: str) -> Outcome:
        outcomes: queue.Queue[Outcome] = queue.Queue()
        self.begin_fetch(peer, transfer_id, outcomes, finished=True)
        return outcomes.get(timeout=TIMEOUT_S)

    def begin_fetch(
        self, peer: PeerAddress, transfer_id: str, outcomes: queue.Queue[Outcome], *, finished: bool = False
    ) -> None:
        run = one_run(0, 0, self.table, range(self.shape.tokens))
        wanted = Wanted(transfer_id, PagesTarget(self.view, (run,)), finished, TIMEOUT_S)
        self.core.subscribe(peer, wanted, outcomes.put)

    def _pinned(self) -> U16:
        address = self.runtime.host_alloc(0, self.shape.layer_bytes)
        memory = (ctypes.c_uint16 * (self.shape.layer_bytes // 2)).from_address(address)
        return np.ctypeslib.as_array(memory).reshape(self.shape.of_layer)

    def _move(self, destination: int, source: int, kind: CopyKind) -> None:
        stream = self.runtime.stream_create(0)
        self.runtime.copy_async(0, destination, source, self.shape.layer_bytes, kind, stream)
        self.runtime.stream_synchronize(0, stream)
        self.runtime.stream_destroy(0, stream)


def page_table(shape: CacheShape, role: str) -> npt.NDArray[np.int64]:
    """Pages in an order that both sides of a bench can tell."""
    return np.random.default_rng(len(role)).permutation(shape.tokens // shape.page)


class Content:
    """What the prefill side's layers hold, which the decode side computes again to compare."""

    def __init__(self, shape: CacheShape) -> None:
        values = np.random.default_rng(11).normal(size=shape.of_layer).astype(np.float32)
        values[..., ::31] *= 10  # as in real K
        self._first = from_float(values, "bf16").astype(np.uint16)

    def of_layer(self, layer: int) -> U16:
        return np.roll(self._first, layer, axis=0)


def wrong_bytes(cache: DeviceCache, source: CacheShape, every: int = 1) -> int:
    """Of the decode side's layers, or each n-th, against the same conversion in host memory by the CPU's kernels."""
    shape, content = cache.shape, Content(source)
    to = np.zeros(shape.of_layer, dtype=np.uint16)
    wrong = 0
    for layer in range(0, shape.layers, every):
        held = content.of_layer(layer)
        _convert(held, to, source, shape, cache.core.config.target_dtype)
        wrong += int(np.count_nonzero(cache.read(layer).view(np.uint8) != to.view(np.uint8)))
    return wrong


def _convert(held: U16, to: U16, source: CacheShape, shape: CacheShape, target_dtype: str) -> None:
    """One layer's pages of a prefill side to those of a decode side."""
    from_group, to_group = (
        _group(one._replace(layers=1), [array]) for one, array in ((source, held), (shape, to))
    )
    producer, consumer = (_schema(source, from_group, "host"), _schema(shape, to_group, "host"))
    tables = (page_table(source, "prefill"), page_table(shape, "decode"))
    if planned_wire_dtype(consumer, producer, target_dtype, device_memory=True) == SAME:
        to[tables[1]] = held[tables[0]]
        return
    formats = plan_wire(consumer, producer, target_dtype).formats[0]
    spans = [Span(0, 1, 0, source.heads, 0, source.tokens, table.tolist()) for table in tables]
    encoder = group_converter(from_group, 0, formats, producer, consumer, producer)
    decoder = group_converter(to_group, 0, formats, consumer, consumer, producer)
    wire = np.empty(encoder.wire_bytes(spans[0]) + 64, dtype=np.uint8)
    start = -int(wire.ctypes.data) % 64
    at, nbytes = int(wire.ctypes.data) + start, len(wire) - 64
    encoder.encode(spans[0], at, nbytes)
    decoder.decode(spans[1], at, nbytes)


def _group(shape: CacheShape, tensors: list[Any]) -> GroupView:
    layers = [(f"layers.{i}", [("kv", tensor, AXES)]) for i, tensor in enumerate(tensors)]
    planes = strided_planes("kv", tensors[0], AXES)
    return group_view("full", shape.page, shape.of_layer[0], layers, heads=shape.heads, canonical=planes)


def _schema(shape: CacheShape, group: GroupView, memory: str) -> KVCacheSchema:
    return KVCacheSchema(
        "bench", "m", "bf16", len(group.layers), shape.heads, 0, shape.heads, shape.dim, (group.schema(),),
        memory=memory,
    )  # fmt: skip


def serve(
    pipe: Connection,
    role: str,
    vendor: str,
    shape: CacheShape,
    source: CacheShape,
    config: dict[str, Any],
    emulated: bool,
) -> None:
    """The process of one side: answers orders of the pipe until ``quit``. ``source``: the prefill side's shape."""
    cache = DeviceCache(vendor, shape, config, role, emulated=emulated)
    content = Content(source)
    zeros = np.zeros(shape.of_layer, dtype=np.uint16)
    for layer in range(shape.layers):
        cache.write(layer, content.of_layer(layer) if role == "prefill" else zeros)
    released: queue.Queue[Outcome] = queue.Queue()
    pipe.send((cache.core.engine_id, cache.core.addresses, cache.runtime.api))
    while (order := pipe.recv())[0] != "quit":
        if order[0] == "offer":
            cache.offer(order[1], released)
            pipe.send("offered")
        elif order[0] == "fetch":
            pipe.send(cache.fetch(PeerAddress(*order[1]), order[2]))
        elif order[0] == "counts":
            pipe.send(cache.counts())
        elif order[0] == "copy":
            pipe.send(cache.copy_seconds(CopyKind(order[1]), order[2]))
        else:
            pipe.send(wrong_bytes(cache, source, *order[1:]))
    cache.core.close()
