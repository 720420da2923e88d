# SPDX-License-Identifier: Apache-2.0
"""All offers of an engine, and which of them a consumer means.

A transfer id may name several offers: a request with several prompts has one id and one KV each. A consumer names
the id and the digest of its prompt. It gets an offer of that id whose prompt begins so and that still expects
consumers; else an offer of any id for just this prompt (vLLM answers a list of prompts with the first one's id);
else it hears what differs. Control thread only.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterator
from typing import NamedTuple, TypeVar

from sage_kv_connector.contract.failure import Reason
from sage_kv_connector.contract.prompt import PromptDigest
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.session.session import Session, owner_of
from sage_kv_connector.engine.transfer.offer import Offer

#: Consumers that were served or gave up, and whose messages may still be under way.
MAX_ENDED = 4096

_Key = TypeVar("_Key")


class Found(NamedTuple):
    """``offer``, or why none of this id fits; neither if nothing of this id is on offer."""

    offer: Offer | None = None
    difference: Reason | None = None


class OfferTable:
    def __init__(self) -> None:
        self._offers: dict[str, Offer] = {}
        self._named: dict[str, list[Offer]] = {}
        #: By the whole prompt.
        self._prompts: dict[PromptDigest, list[Offer]] = {}
        self._of_peer: Counter[Hashable] = Counter()
        self._consumers: dict[tuple[int, int], Offer] = {}
        self._ended: OrderedDict[tuple[int, int], None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._offers)

    def __iter__(self) -> Iterator[Offer]:
        return iter(list(self._offers.values()))

    def get(self, transfer_id: str) -> Offer | None:
        return self._offers.get(transfer_id)

    def add(self, offer: Offer) -> None:
        self._offers[offer.transfer_id] = offer
        for name in offer.names:
            self._named.setdefault(name, []).append(offer)
        if offer.prompt is not None:
            self._prompts.setdefault(offer.prompt.whole, []).append(offer)

    def remove(self, offer: Offer) -> None:
        if self._offers.get(offer.transfer_id) is not offer:
            return  # another one may have its id by now
        del self._offers[offer.transfer_id]
        for name in offer.names:
            _drop(self._named, name, offer)
        if offer.prompt is not None:
            _drop(self._prompts, offer.prompt.whole, offer)

    def named(self, name: str) -> list[Offer]:
        return list(self._named.get(name, ()))

    def find_for(self, request: m.Subscribe | m.SubscribeParts) -> Found:
        return self.find(request.transfer_id, request.prompt, request.consumers)

    def find(self, transfer_id: str, prompt: PromptDigest, consumers: int) -> Found:
        """The offer for a new consumer of a prompt, one of ``consumers``."""
        named = self._named.get(transfer_id, [])
        fitting = [offer for offer in named if not offer.differs(prompt)]
        same = self._prompts.get(prompt, []) if prompt.digest else []
        with_room = (offer for offer in (*fitting, *same) if offer.has_room(consumers))
        offer = next(with_room, fitting[0] if fitting else None)
        if offer is not None:
            return Found(offer)
        return Found(None, named[0].differs(prompt)) if named else Found()

    # -- consumers that are being served

    def of_consumer(self, session: Session, generation: int) -> Offer | None:
        return self._consumers.get((id(session), generation))

    def has_ended(self, session: Session, generation: int) -> bool:
        return (id(session), generation) in self._ended

    def streams_of(self, owner: Hashable) -> int:
        """How many of a peer's subscriptions are being served."""
        return self._of_peer[owner]

    def begin(self, session: Session, generation: int, offer: Offer) -> None:
        self._of_peer[owner_of(session)] += 1
        self._consumers[(id(session), generation)] = offer

    def end(self, session: Session, generation: int) -> None:
        if self._consumers.pop((id(session), generation), None) is not None:
            owner = owner_of(session)
            self._of_peer[owner] -= 1
            if not self._of_peer[owner]:
                del self._of_peer[owner]
            self._ended[(id(session), generation)] = None
            while len(self._ended) > MAX_ENDED:
                self._ended.popitem(last=False)


def _drop(table: dict[_Key, list[Offer]], key: _Key, offer: Offer) -> None:
    left = [other for other in table[key] if other is not offer]
    if left:
        table[key] = left
    else:
        del table[key]
