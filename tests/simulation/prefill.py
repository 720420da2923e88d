# SPDX-License-Identifier: Apache-2.0
"""A request on a prefill server: its pages are computed step by step, offered, and used again once released."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np

from sage_kv_connector.contract.failure import Code, Reason
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.contract.prompt import Prompt, PromptDigest
from sage_kv_connector.engine.pages.paged import PagedSource
from sage_kv_connector.engine.transfer.offer import OfferTerms
from tests.simulation.schedule import Request
from tests.simulation.server import DIM, HEADS, LAYERS, SCRIBBLE, Elements, Server

if TYPE_CHECKING:
    from tests.simulation.world import World

LONGEST = 160


@cache
def truth(number: int) -> Elements:
    """The KV of request ``number``: (layers, 2, tokens, heads, channels), without the scribble."""
    drawn = np.random.default_rng(number).integers(
        0, SCRIBBLE, (LAYERS, 2, LONGEST, HEADS, DIM), dtype=np.uint16
    )
    drawn.flags.writeable = False
    return drawn


@cache
def prompt_of(number: int, tokens: int) -> Prompt:
    return Prompt([number * 1000 + i for i in range(tokens)])


@cache
def digest_of(number: int, tokens: int) -> PromptDigest:
    return prompt_of(number, tokens).whole


class PrefillRequest:
    """``released`` is called once for each time it was offered."""

    def __init__(self, world: World, request: Request) -> None:
        self.world, self.request = world, request
        self.transfer_id = f"request-{request.number}"
        self.server: Server | None = None  #: who computes it
        self.pages: list[int] = []
        self.source: PagedSource | None = None
        self.computed = 0  #: tokens
        self.finished = False
        self.offered_at: float | None = None  #: of the last time
        self.finished_at: float | None = None
        self.released_at: float | None = None
        self.served = False  #: the last bytes left
        self.ended_at: float | None = None  #: by the engine, before all was computed or fetched
        self.releases = self.offers = 0
        self.lost = 0  #: offers that died with their server

    def begin(self) -> None:
        """Offered, for the first time or again."""
        server = self.world.prefill(self.request.server)
        if not server.alive:
            return
        pages = server.take(-(-self.request.tokens // server.memory.layout.page_size))
        if pages is None:
            return
        if self.server is not None and not self.server.alive:
            self.lost = self.offers - self.releases
        self.server, self.pages, self.computed, self.finished = server, pages, 0, False
        self.source = PagedSource(server.memory.view, 0)
        self.source.set_pages(0, np.array(pages))
        self.offers += 1
        self.offered_at = self.world.clock.seconds
        terms = OfferTerms(self.request.consumers, prompt=prompt_of(self.request.number, self.request.tokens))
        server.core.offer(self.transfer_id, self.source, partial(self._released, server, pages), terms)
        self.world.after(self.request.step_s, self._step, self.offers)
        if self.offers == 1 and self.request.how not in ("finished", "never"):
            self.world.after(self.request.ends_s, self._end)

    def _step(self, offer: int) -> None:
        server, source = self.server, self.source
        if offer != self.offers or server is None or source is None or not server.alive:
            return
        if self.source is not None and not self.pages:
            return
        size, request = server.memory.layout.page_size, self.request
        chunk = -(-request.tokens // request.steps)
        first, end = self.computed, min(self.computed + chunk, request.tokens)
        of_request = truth(request.number)
        for layer in range(LAYERS):
            for token in range(first // size * size, end, size):
                a, b = max(first, token), min(end, token + size)
                page = server.memory.elements(layer, self.pages[token // size])
                page[:, a - token : b - token] = of_request[layer, :, a:b]
            if request.by_layer:
                whole = end // size if end < request.tokens else len(self.pages)
                server.core.update(self.transfer_id, source.advance, 0, slice(layer, layer + 1), whole)
        self.computed = end
        if end < request.tokens:
            if not request.by_layer:
                server.core.update(self.transfer_id, source.advance_all, (end // size,))
            self.world.after(request.step_s, self._step, offer)
            return
        if not request.by_layer:
            server.core.update(self.transfer_id, source.advance_all, (len(self.pages),))
        if request.how == "never":
            return
        server.core.update(self.transfer_id, source.end, (len(self.pages),))
        server.core.finish(self.transfer_id)
        self.finished = True
        self.finished_at = self.world.clock.seconds

    def _end(self) -> None:
        server, how = self.server, self.request.how
        if server is None or not server.alive:
            return
        self.ended_at = self.world.clock.seconds
        if how == "given_up":
            server.core.give_up((self.transfer_id,), Reason(Code.WITHDRAWN, "aborted"))
        else:
            server.core.withdraw((self.transfer_id,), how, wait=self.request.waits)
        if (how == "given_up" or self.request.waits) and self.pages:
            self.world.wrong.append(f"{self.transfer_id}: withdrawn, and its pages are not free")
        if how == "preempted":
            self.world.after(0.05, self.begin)

    def give_up_at_last(self) -> None:
        """The engine aborts what never ends."""
        if self.request.how == "never" and self.server is not None and self.server.alive and self.pages:
            self.server.core.withdraw((self.transfer_id,), "aborted at last", wait=False)

    def _released(self, server: Server, pages: list[int], outcome: Outcome) -> None:
        self.releases += 1
        self.released_at = self.world.clock.seconds
        self.served = outcome.ok
        if self.releases > self.offers:
            self.world.wrong.append(
                f"{self.transfer_id}: released {self.releases} times, offered {self.offers}"
            )
            return
        if pages is self.pages:
            self.pages = []
        server.put_back(pages)

    def unanswered(self) -> list[str]:
        if self.server is not None and self.server.alive and self.releases < self.offers - self.lost:
            return [
                f"{self.transfer_id}: offered {self.offers} times, released {self.releases}, lost {self.lost}"
            ]
        return []
