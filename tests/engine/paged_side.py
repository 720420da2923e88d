# SPDX-License-Identifier: Apache-2.0
"""An engine with a small paged cache, over the in-process backend."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from sage_kv_connector.contract.cache_view import KVCacheView, group_view
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.contract.prompt import UNBOUND
from sage_kv_connector.engine.core import EngineCore
from sage_kv_connector.engine.pages.paged import PagedSource
from sage_kv_connector.engine.pages.target import PagesTarget, one_run
from sage_kv_connector.engine.transfer.offer import NO_TERMS, OfferTerms
from sage_kv_connector.engine.transfer.subscription import Subscription, Wanted
from tests.engine.memory_backend import MemoryBackend

LAYERS, PAGES, HEADS, PAGE_SIZE, DIM = 3, 16, 2, 8, 4

MakeCore = Callable[..., EngineCore]


class Side:
    """One engine with a small paged cache."""

    def __init__(self, core: EngineCore, seed: int) -> None:
        self.core = core
        rng = np.random.default_rng(seed)
        shape = (PAGES, HEADS, PAGE_SIZE, 2 * DIM)
        self.cache = [rng.integers(0, 255, shape, dtype=np.uint8) for _ in range(LAYERS)]
        layers = [
            (f"layer{i}", [("kv", t, ("page", "head", "token", "content"))]) for i, t in enumerate(self.cache)
        ]
        self.view = KVCacheView((group_view("fullattention", PAGE_SIZE, PAGES, layers),))
        core.register_memory(self.view.extents())
        self.released: queue.Queue[Outcome] = queue.Queue()
        self.outcomes: queue.Queue[Outcome] = queue.Queue()

    def address(self) -> PeerAddress:
        return PeerAddress(self.core.engine_id, 0, self.core.addresses)

    def offer(self, transfer_id: str, pages: list[int], terms: OfferTerms = NO_TERMS) -> PagedSource:
        source = PagedSource(self.view)
        source.set_pages(0, np.array(pages))
        self.core.offer(transfer_id, source, self.released.put, terms)
        return source

    def prefilled(self, transfer_id: str, pages: list[int], terms: OfferTerms = NO_TERMS) -> None:
        """On offer, with all its pages final."""
        source = self.offer(transfer_id, pages, terms)
        self.ready(transfer_id, source, slice(None), len(pages))
        self.core.finish(transfer_id)

    def ready(self, transfer_id: str, source: PagedSource, layers: slice, pages: int) -> None:
        self.core.update(transfer_id, lambda: source.advance(0, layers, pages))

    def subscribe(
        self, peer: Side, transfer_id: str, indices: range, pages: list[int], **kwargs: Any
    ) -> list[Subscription]:
        started: list[Subscription] = []
        tokens = range(indices.start * PAGE_SIZE, indices.stop * PAGE_SIZE)
        wanted = Wanted(
            transfer_id=transfer_id,
            target=PagesTarget(self.view, (one_run(0, indices.start, np.array(pages), tokens),)),
            finished=kwargs.get("finished", False),
            deadline_s=kwargs.get("deadline_s", 10.0),
            prompt=kwargs.get("prompt", UNBOUND),
            trace=kwargs.get("trace"),
            offer_trace=kwargs.get("offer_trace"),
        )
        self.core.subscribe(
            kwargs.get("address") or peer.address(), wanted, self.outcomes.put, started.append
        )
        return started

    def backend(self) -> MemoryBackend:
        backend = self.core.backends["memory"]
        assert isinstance(backend, MemoryBackend)
        return backend


def assert_pages_equal(prefill: Side, source: list[int], decode: Side, target: list[int]) -> None:
    for there, here in zip(prefill.cache, decode.cache, strict=True):
        np.testing.assert_array_equal(there[source], here[target])


def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "condition did not come true in time"
        time.sleep(0.005)
