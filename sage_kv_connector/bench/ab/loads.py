# SPDX-License-Identifier: Apache-2.0
"""Requests by name of a load and seed: the same prompts at the same times for every arm.

``closed-N``: N clients, each asks when it was answered; no two prompts share a page. ``open-P``: Poisson arrivals
at P percent of what the link could carry of KV in bf16. ``rag``: four clients ask about documents that they
share, by Zipf's popularity. ``chat``: four conversations; each turn repeats what was said before.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import NamedTuple

#: Prompts are whole pages of vLLM's on a CPU and one token more, which decode computes from all KV.
PAGE = 128
CLIENTS = 4
#: Exponent of the documents' popularity.
ZIPF = 1.1
DOCUMENTS, QUESTION = 4, PAGE
TURN = 2 * PAGE


class Request(NamedTuple):
    """``at_s``: when it is sent, from the load's begin; none: when the one before it in its queue is answered."""

    prompt: list[int]
    at_s: float | None = None


#: What one client asks, in this order.
Queue = list[Request]


class LoadError(ValueError):
    """No load has this name."""


def made(name: str, tokens: int, requests: int, seed: str, link_requests_s: float | None) -> list[Queue]:
    """``requests`` in all, of about ``tokens``. ``link_requests_s``: how many such prompts the link carries a second.

    Raises LoadError for a name that is none, or an open load where no link limits it.
    """
    source = random.Random(f"{seed} {name} {tokens}")
    closed, opened = re.fullmatch(r"closed-(\d+)", name), re.fullmatch(r"open-(\d+)", name)
    if closed and int(closed[1]) > 0:
        prompts = (Request(_pages(source, tokens) + _text(source, 1)) for _ in range(requests))
        return _dealt(prompts, min(int(closed[1]), requests))
    if opened and int(opened[1]) > 0:
        if link_requests_s is None:
            raise LoadError(f"load {name!r}: open loads want a link with a rate")
        return [[one] for one in _poisson(source, tokens, requests, link_requests_s * int(opened[1]) / 100)]
    if name == "rag":
        return _dealt(_about_documents(source, tokens, requests), min(CLIENTS, requests))
    if name == "chat":
        return _conversations(source, tokens, requests)
    raise LoadError(f"load {name!r} is none of closed-N, open-P, rag, chat")


def _poisson(source: random.Random, tokens: int, requests: int, a_second: float) -> Iterator[Request]:
    at_s = 0.0
    for _ in range(requests):
        yield Request(_pages(source, tokens) + _text(source, 1), at_s)
        at_s += source.expovariate(a_second)


def _about_documents(source: random.Random, tokens: int, requests: int) -> Iterator[Request]:
    """Documents of half of ``tokens`` to all of it; a question of a page each."""
    documents = [_pages(source, source.randint(tokens // 2, tokens)) for _ in range(DOCUMENTS)]
    weights = [1 / (rank + 1) ** ZIPF for rank in range(DOCUMENTS)]
    for document in source.choices(documents, weights, k=requests):
        yield Request(document + _text(source, QUESTION + 1))


def _conversations(source: random.Random, tokens: int, requests: int) -> list[Queue]:
    """Each begins with half of ``tokens`` and grows by a fixed answer and a new question a turn."""
    queues: list[Queue] = []
    clients = min(CLIENTS, requests)
    for client in range(clients):
        said = _pages(source, tokens // 2)
        queues.append([])
        for _ in range(requests // clients + (client < requests % clients)):
            queues[-1].append(Request(said + _text(source, 1)))
            said = said + _text(source, TURN)
    return queues


def _dealt(requests: Iterator[Request], clients: int) -> list[Queue]:
    queues: list[Queue] = [[] for _ in range(clients)]
    for number, request in enumerate(requests):
        queues[number % clients].append(request)
    return queues


def _pages(source: random.Random, tokens: int) -> list[int]:
    return _text(source, max(PAGE, tokens // PAGE * PAGE))


def _text(source: random.Random, tokens: int) -> list[int]:
    return [source.randint(1, 255) for _ in range(tokens)]
