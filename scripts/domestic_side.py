# SPDX-License-Identifier: Apache-2.0
"""One side of ``scripts/demo_domestic.py``: an engine whose paged KV cache lies on an emulated device.

Content is known without keeping it: a block of 64 tokens of a layer is one of eight
patterns, so that what must land is computed by the NumPy reference from the patterns alone.
"""

from __future__ import annotations

import ctypes
import queue
import time
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sage_kv_connector.bench.device_cache import DeviceTensor
from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.cache_view import KVCacheView, group_view, strided_planes
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.devices.runtime import CopyKind, DeviceMemory, DeviceRuntime
from sage_kv_connector.engine.conversion.wire_plan import plan_wire
from sage_kv_connector.engine.core import EngineCore
from sage_kv_connector.engine.pages.paged import PagedSource
from sage_kv_connector.engine.pages.target import PagesTarget, one_run
from sage_kv_connector.engine.transfer.subscription import Wanted
from sage_kv_connector.format.reference import decode_tile, encode_tile, from_float, to_float
from sage_kv_connector.vendors import open_runtime
from sage_kv_connector.vendors.emulator import EmulatorSettings
from sage_kv_connector.vendors.emulator.control import control_of

LAYERS, HEADS, DIM, PAGE, BLOCK = 32, 8, 128, 16, 64
PATTERNS = 8
AXES = ("plane", "page", "token", "head", "dim")
BYTES_PER_TOKEN = LAYERS * 2 * HEADS * DIM * 2
U16 = npt.NDArray[np.uint16]


class SideOptions(NamedTuple):
    """What a side needs to begin; ``settings`` are those of the emulated machine."""

    role: str
    vendor: str
    settings: dict[str, Any]
    config: dict[str, Any]
    tokens: int


def patterns() -> U16:
    """bf16, shape (PATTERNS, BLOCK, HEADS, DIM); some channels are ten times as large, as in real K."""
    rng = np.random.default_rng(7)
    values = rng.normal(size=(PATTERNS, BLOCK, HEADS, DIM)).astype(np.float32)
    values[..., ::31] *= 10
    return from_float(values, "bf16").astype(np.uint16)


def chosen(layer: int, plane: int, blocks: int) -> npt.NDArray[np.int64]:
    """Which pattern each block of a layer's plane is."""
    return (np.arange(blocks) * 5 + layer * 3 + plane) % PATTERNS


class Side:
    """A cache on device 0 of an emulated machine of its own."""

    def __init__(self, options: SideOptions) -> None:
        self.options = options
        self.pages = options.tokens // PAGE
        self.runtime: DeviceRuntime = open_runtime(options.vendor, EmulatorSettings(**options.settings))
        shape = (2, self.pages, PAGE, HEADS, DIM)
        self.layer_bytes = int(np.prod(shape)) * 2
        self.tensors = [DeviceTensor(self.runtime.alloc(0, self.layer_bytes), shape) for _ in range(LAYERS)]
        planes = strided_planes("kv", self.tensors[0], AXES)
        layers = [(f"model.layers.{i}.attn", [("kv", t, AXES)]) for i, t in enumerate(self.tensors)]
        group = group_view("full", PAGE, self.pages, layers, heads=HEADS, canonical=planes)
        self.view = KVCacheView((group,))
        schema = KVCacheSchema(
            "demo", "demo", "bf16", LAYERS, HEADS, 0, HEADS, DIM, (group.schema(),), memory="device"
        )
        self.schema = schema
        self.core = EngineCore(
            KVTransportConfig.load(options.config), schema=schema, device=DeviceMemory(self.runtime, 0)
        )
        self.core.register_memory(self.view.extents())
        self.core.start()
        self.table = np.random.default_rng(len(options.role)).permutation(self.pages)
        self._host = self._pinned()

    def asked(self) -> dict[str, int]:
        """Of the emulated machine: ``asked_WAY_calls``, ``_copies`` and ``_bytes``."""
        counts = control_of(self.runtime).counts()
        return {
            f"asked_{way}_{name}": value
            for way, each in counts.items()
            for name, value in each._asdict().items()
        }

    def fill(self) -> None:
        """Write the patterns into the pages, layer by layer."""
        known = patterns()
        blocks = self.options.tokens // BLOCK
        for layer, tensor in enumerate(self.tensors):
            for plane in (0, 1):
                content = known[chosen(layer, plane, blocks)].reshape(self.pages, PAGE, HEADS, DIM)
                self._host[plane, self.table] = content
            self._copy(tensor.address, self._host.ctypes.data, CopyKind.HOST_TO_DEVICE)

    def clear(self) -> None:
        """Zeros everywhere: a device has its memory before a copy comes, an emulated one when it is written."""
        self._host[:] = 0
        for tensor in self.tensors:
            self._copy(tensor.address, self._host.ctypes.data, CopyKind.HOST_TO_DEVICE)

    def offer(self, transfer_id: str, released: queue.Queue[Outcome]) -> None:
        source = PagedSource(self.view)
        source.set_pages(0, self.table)
        source.advance(0, slice(None), self.pages)
        self.core.offer(transfer_id, source, released.put)
        self.core.finish(transfer_id)

    def fetch(self, peer: PeerAddress, transfer_id: str) -> Outcome:
        wanted = Wanted(
            transfer_id,
            PagesTarget(self.view, (one_run(0, 0, self.table, range(self.options.tokens)),)),
            True,
            600.0,
        )
        outcomes: queue.Queue[Outcome] = queue.Queue()
        self.core.subscribe(peer, wanted, outcomes.put)
        return outcomes.get(timeout=620)

    def check(self) -> int:
        """Bytes on the device that are not what the reference makes of the patterns."""
        formats = plan_wire(self.schema, self.schema, self.core.config.target_dtype).formats[0]
        blocks = self.options.tokens // BLOCK
        expected = [through_the_wire(fmt) for fmt in formats]
        wrong = 0
        for layer, tensor in enumerate(self.tensors):
            self._copy(self._host.ctypes.data, tensor.address, CopyKind.DEVICE_TO_HOST)
            for plane in (0, 1):
                landed = self._host[plane, self.table].view(np.uint8)
                wanted = expected[plane][chosen(layer, plane, blocks)].view(np.uint8)
                wrong += int(np.count_nonzero(landed.reshape(-1) != wanted.reshape(-1)))
        return wrong

    def _pinned(self) -> U16:
        address = self.runtime.host_alloc(0, self.layer_bytes)
        memory = (ctypes.c_uint16 * (self.layer_bytes // 2)).from_address(address)
        return np.ctypeslib.as_array(memory).reshape(self.tensors[0].shape)

    def _copy(self, destination: int, source: int, kind: CopyKind) -> None:
        stream = self.runtime.stream_create(0)
        self.runtime.copy_async(0, destination, source, self.layer_bytes, kind, stream)
        self.runtime.stream_synchronize(0, stream)
        self.runtime.stream_destroy(0, stream)


def through_the_wire(fmt: Any) -> U16:
    """The patterns as they come out at the other side, by the reference."""
    known = patterns()
    out = np.empty_like(known)
    for pattern in range(PATTERNS):
        for head in range(HEADS):
            tile = encode_tile(to_float(known[pattern, :, head], "bf16"), fmt)
            out[pattern, :, head] = from_float(decode_tile(tile, fmt, BLOCK, DIM), "bf16")
    return out


def serve(pipe: Connection, options: SideOptions) -> None:
    """The process of one side: answers orders of the pipe until ``quit``."""
    side = Side(options)
    if options.role == "prefill":
        side.fill()
    else:
        side.clear()
    released: queue.Queue[Outcome] = queue.Queue()
    pipe.send((side.core.engine_id, side.core.addresses, side.runtime.api))
    while True:
        order, *arguments = pipe.recv()
        if order == "offer":
            side.offer(arguments[0], released)
            pipe.send("offered")
        elif order == "fetch":
            begun = time.perf_counter()
            outcome = side.fetch(PeerAddress(*arguments[0]), arguments[1])
            pipe.send((outcome, time.perf_counter() - begun))
        elif order == "counters":
            pipe.send(side.core.counters() | side.asked())
        elif order == "rates":
            side.runtime.emulator.set(**arguments[0])  # type: ignore[attr-defined]
            pipe.send("set")
        elif order == "check":
            pipe.send(side.check())
        else:
            side.core.close()
            return
