# SPDX-License-Identifier: Apache-2.0
"""A load on a decode server: answered once and in time, with the right bytes or a named failure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sage_kv_connector.contract.failure import Code
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.engine.pages.target import PagesTarget, one_run
from sage_kv_connector.engine.transfer.subscription import Subscription, Wanted
from tests.simulation.prefill import PrefillRequest, digest_of, truth
from tests.simulation.schedule import Load
from tests.simulation.server import LAYERS, Server
from tests.simulation.stepped import PLANTED_DEATH

if TYPE_CHECKING:
    from tests.simulation.world import World

#: An answer may be this much behind its deadline, beside the time that its server could not move.
SLACK_S = 0.5
RENEWED_S = 0.4


class DecodeLoad:
    def __init__(self, world: World, prefill: PrefillRequest, load: Load) -> None:
        self.world, self.prefill, self.load = world, prefill, load
        self.name = f"{prefill.transfer_id} on decode {load.server}"
        self.server: Server | None = None
        self.peer: PeerAddress | None = None
        self.pages: list[int] = []
        self.started: list[Subscription] = []
        self.answers: list[Outcome] = []
        self.asked = False
        self.asked_at = 0.0
        self.answered_at: float | None = None
        self.declined_at: float | None = None

    def begin(self) -> None:
        load, request = self.load, self.prefill.request
        server = self.world.decode(load.server)
        if load.never_comes or not server.alive:
            return
        self.server = server
        of_prefill = self.prefill.server or self.world.prefill(request.server)
        self.peer = of_prefill.address
        digest = digest_of(request.number + (500 if load.other_prompt else 0), request.tokens)
        if load.declines:
            self.declined_at = self.world.clock.seconds
            server.core.release(self.peer, self.prefill.transfer_id, request.consumers, "", digest)
            return
        size = server.memory.layout.page_size
        pages = server.take(-(-request.tokens // size) - load.first_page)
        if pages is None:
            self.declined_at = self.world.clock.seconds
            server.core.release(self.peer, self.prefill.transfer_id, request.consumers, "no memory", digest)
            return
        self.pages = pages
        tokens = range(load.first_page * size, request.tokens)
        target = PagesTarget(server.memory.view, (one_run(0, load.first_page, np.array(pages), tokens),))
        wanted = Wanted(
            self.prefill.transfer_id,
            target,
            self.prefill.finished,
            load.deadline_s,
            request.consumers,
            digest,
        )
        self.asked, self.asked_at = True, self.world.clock.seconds
        server.core.subscribe(self.peer, wanted, self._answered, self.started.append)
        if load.cancel_s:
            self.world.after(load.cancel_s, self._cancel)
        if load.renews:
            self.world.after(RENEWED_S, self._renew)

    def _cancel(self) -> None:
        if self.server is not None and self.server.alive and not self.answers:
            self.server.core.cancel_all(self.started)
            if not self.answers:
                self.world.wrong.append(f"{self.name}: cancelled, and not answered")

    def _renew(self) -> None:
        if self.server is not None and self.server.alive and not self.answers and self.peer is not None:
            self.server.core.renew(self.peer, (self.prefill.transfer_id,))
            self.world.after(RENEWED_S, self._renew)

    def _answered(self, outcome: Outcome) -> None:
        assert self.server is not None
        self.answers.append(outcome)
        self.answered_at = self.world.clock.seconds
        if len(self.answers) > 1:
            self.world.wrong.append(f"{self.name}: answered {len(self.answers)} times")
            return
        late = (
            self.world.clock.seconds - self.asked_at - self.load.deadline_s - self.world.lost_s(self.server)
        )
        if late > SLACK_S:
            self.world.wrong.append(f"{self.name}: answered {late:.1f} s behind its deadline")
        if outcome.stats is not None:
            self.world.right += 1
            self._compare(self.server)
        else:
            code = outcome.failure.code if outcome.failure else None
            self.world.failures[str(code)] = self.world.failures.get(str(code), 0) + 1
            if code is Code.INTERNAL and PLANTED_DEATH not in str(outcome.failure):
                self.world.wrong.append(f"{self.name}: {outcome.failure}")
        self.server.put_back(self.pages)

    def _compare(self, server: Server) -> None:
        request, size = self.prefill.request, server.memory.layout.page_size
        if self.load.other_prompt:
            self.world.wrong.append(f"{self.name}: it got KV of another prompt")
        of_request = truth(request.number)
        for index, page in enumerate(self.pages, self.load.first_page):
            first, end = index * size, min(index * size + size, request.tokens)
            for layer in range(LAYERS):
                here = server.memory.elements(layer, page)[:, : end - first]
                if not np.array_equal(here, of_request[layer, :, first:end]):
                    self.world.wrong.append(
                        f"{self.name}: wrong bytes in layer {layer}, tokens {first} to {end}"
                    )
                    return

    @property
    def satisfied(self) -> bool:
        """It got its bytes, or said that it wants none."""
        if self.declined_at is not None:
            return not self.load.other_prompt
        return bool(self.answers) and self.answers[0].stats is not None

    @property
    def ended_at(self) -> float | None:
        """When it was answered, or its server died."""
        if self.server is not None and self.server.ended_at is not None:
            return min(self.answered_at or self.server.ended_at, self.server.ended_at)
        return self.answered_at or self.declined_at

    def unanswered(self) -> list[str]:
        if self.asked and self.server is not None and self.server.alive and not self.answers:
            return [f"{self.name}: never answered"]
        return []
