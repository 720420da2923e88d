# SPDX-License-Identifier: Apache-2.0
"""An engine with a paged cache of any page size, order, dtype, heads and layers, for tests of conversion."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from sage_kv_connector.contract.cache_view import CanonicalPlane, KVCacheView, group_view
from sage_kv_connector.contract.element_order import packed_cpu_planes, strided
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.devices.runtime import DeviceMemory
from sage_kv_connector.engine.core import EngineCore
from sage_kv_connector.engine.pages.paged import PagedSource
from sage_kv_connector.engine.pages.target import GroupPages, PagesTarget
from sage_kv_connector.engine.session.transfer_messages import Runs
from sage_kv_connector.engine.transfer.subscription import Subscription, Wanted
from sage_kv_connector.format.reference import RAW

DIM = 32
TOTAL_HEADS = 4
TOTAL_LAYERS = 4


class Shape(NamedTuple):
    """What may differ between two sides."""

    dtype: str = "bf16"
    page_size: int = 16
    packing: str = ""
    heads: tuple[int, int] = (0, TOTAL_HEADS)
    layers: tuple[int, int] = (0, TOTAL_LAYERS)
    scales: tuple[float, float] = (1.0, 1.0)
    order: str = "hnd"
    total_heads: int = TOTAL_HEADS


class ConvertingSide:
    """``elements`` and ``fill`` work on canonical coordinates: raw bits, shape (tokens, DIM)."""

    def __init__(
        self, make_core: Callable[..., EngineCore], shape: Shape, pages: int, **options: Any
    ) -> None:
        self.shape = shape
        item = np.dtype(RAW[shape.dtype]).itemsize
        heads, size = shape.heads[1] - shape.heads[0], shape.page_size
        if shape.packing:
            orders = packed_cpu_planes(shape.packing, item, size, DIM)
            assert orders is not None
        elif shape.order == "nhd":
            plane = size * heads * DIM * item
            token = heads * DIM * item
            orders = strided(0, DIM * item, token, item), strided(plane, DIM * item, token, item)
        else:  # fused: K's channels, then V's, of each token
            token = 2 * DIM * item
            orders = strided(0, size * token, token, item), strided(DIM * item, size * token, token, item)
        self.orders = orders
        self.page_bytes = 2 * heads * size * DIM * item
        names = [f"model.layers.{i}.attn" for i in range(*shape.layers)]
        self.cache = [np.zeros((pages, self.page_bytes), np.uint8) for _ in names]
        tensors = self.place()
        layers = [(name, [("kv", t, ("page", "content"))]) for name, t in zip(names, tensors, strict=True)]
        canonical = (CanonicalPlane("k", DIM, 0, orders[0]), CanonicalPlane("v", DIM, 0, orders[1]))
        scales = (shape.scales,) * len(names) if shape.dtype.startswith("fp8") else ()
        group = group_view(
            "fullattention", size, pages, layers, heads=heads, canonical=canonical, scales=scales
        )
        self.view = KVCacheView((group,))
        self.schema = KVCacheSchema(
            "test",
            "m",
            shape.dtype,
            TOTAL_LAYERS,
            shape.total_heads,
            shape.heads[0],
            heads,
            DIM,
            (group.schema(),),
            packing=shape.packing or shape.order,
            tp_size=shape.total_heads // heads,
            tp_rank=shape.heads[0] // heads,
            pp_size=TOTAL_LAYERS // len(names),
            pp_rank=shape.layers[0] // len(names),
            memory=self.memory,
        )
        self.schema = msgspec.json.decode(msgspec.json.encode(self.schema), type=KVCacheSchema)
        self.core = make_core(options, schema=self.schema, device=self.device())
        self.core.register_memory(self.view.extents())
        self.outcomes: queue.Queue[Outcome] = queue.Queue()
        self.released: queue.Queue[Outcome] = queue.Queue()

    memory = "host"

    def place(self) -> Sequence[Any]:
        """The cache where the engine finds it, as tensors."""
        return self.cache

    def device(self) -> DeviceMemory | None:
        return None

    def address(self) -> PeerAddress:
        return PeerAddress(self.core.engine_id, 0, self.core.addresses)

    def _at(self, plane: int, head: int, token: int) -> npt.NDArray[np.int64]:
        order, item = self.orders[plane], np.dtype(RAW[self.shape.dtype]).itemsize
        channels = np.arange(DIM)
        t, c = order.token, order.channel
        start = order.offset + (head - self.shape.heads[0]) * order.head_stride
        start += (token % t[0]) * t[1] + (token // t[0]) * t[2]
        found: npt.NDArray[np.int64] = start + (channels % c[0]) * c[1] + (channels // c[0]) * c[2]
        return found[:, None] + np.arange(item)

    def elements(
        self, layer: int, plane: int, head: int, tokens: range, pages: Sequence[int]
    ) -> npt.NDArray[np.generic]:
        """``pages`` from page 0 of the request on."""
        size, cache = self.shape.page_size, self.cache[layer - self.shape.layers[0]]
        rows = [cache[pages[t // size]][self._at(plane, head, t % size)] for t in tokens]
        return np.stack(rows).reshape(len(rows), -1).view(RAW[self.shape.dtype])

    def fill(
        self,
        layer: int,
        plane: int,
        head: int,
        tokens: range,
        pages: Sequence[int],
        raw: npt.NDArray[np.generic],
    ) -> None:
        size, cache = self.shape.page_size, self.cache[layer - self.shape.layers[0]]
        item = np.dtype(RAW[self.shape.dtype]).itemsize
        for row, t in zip(raw, tokens, strict=True):
            cache[pages[t // size]][self._at(plane, head, t % size)] = row.view(np.uint8).reshape(-1, item)

    def offer(self, transfer_id: str, pages: Sequence[int]) -> PagedSource:
        source = PagedSource(self.view)
        source.set_pages(0, np.array(pages))
        self.core.offer(transfer_id, source, self.released.put)
        return source

    def ready(self, transfer_id: str, source: PagedSource, layers: slice, pages: int) -> None:
        self.core.update(transfer_id, lambda: source.advance(0, layers, pages))

    def subscribe(
        self,
        peer: ConvertingSide | PeerAddress,
        transfer_id: str,
        tokens: range,
        pages: Sequence[int],
        consumers: int = 1,
        **kwargs: Any,
    ) -> list[Subscription]:
        """``pages`` from page 0 of the request on."""
        started: list[Subscription] = []
        first, last = tokens.start // self.shape.page_size, (tokens.stop - 1) // self.shape.page_size
        ids = list(pages)[first : last + 1]
        runs: Runs = ((first, len(ids)),)
        if not kwargs.get("by_tokens", True):  # pages with a gap between them: tokens can't say which
            runs = ((first, len(ids) - 1), (last + 1, 1))
        wanted = Wanted(
            transfer_id,
            PagesTarget(self.view, (GroupPages(0, runs, np.array(ids), tokens),)),
            kwargs.get("finished", False),
            kwargs.get("deadline_s", 10.0),
            consumers,
        )
        address = peer if isinstance(peer, PeerAddress) else peer.address()
        self.core.subscribe(address, wanted, self.outcomes.put, started.append)
        return started
