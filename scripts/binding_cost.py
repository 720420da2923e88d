# SPDX-License-Identifier: Apache-2.0
"""What binding a transfer to its prompt costs: hand-overs with and without it, interleaved, over shm.

    python -m scripts.binding_cost [--tokens 2048,32768] [--rounds 15] [--json]

Two engines and KV caches of 16 KiB a token in one process, no inference engine around them, so the share of a request
is smaller than what is printed. With binding both sides make the prompt's digest as the connectors do, prefill pickles
it for its workers and compares. JSON, by number of tokens: ``bound_ms`` and ``unbound_ms`` (medians), ``ratio``
(median of the ratios within each round), ``digest_us`` (both sides' work for the prompt alone) and its
``share`` of an unbound hand-over.
"""

from __future__ import annotations

import argparse
import json
import pickle
import queue
import random
import time
from statistics import median
from typing import Any

import numpy as np

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.cache_view import KVCacheView, group_view
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.contract.prompt import UNBOUND, Prompt, PromptDigest
from sage_kv_connector.engine import EngineCore, OfferTerms, PagedSource, PagesTarget, Wanted
from sage_kv_connector.engine.pages.target import one_run

LAYERS, HEADS, DIM, PAGE = 8, 4, 128, 128
VOCABULARY = 150_000


class Side:
    """An engine and its cache; page ``i`` of a request is page ``i`` of the cache."""

    def __init__(self, pages: int) -> None:
        shape = (pages, HEADS, PAGE, 2 * DIM)
        self.cache = [np.ones(shape, dtype=np.uint16) for _ in range(LAYERS)]
        axes = ("page", "head", "token", "content")
        layers = [(f"layers.{i}", [("kv", tensor, axes)]) for i, tensor in enumerate(self.cache)]
        self.view = KVCacheView((group_view("fullattention", PAGE, pages, layers),))
        self.core = EngineCore(KVTransportConfig(backend="shm"))
        self.core.register_memory(self.view.extents())
        self.core.start()


class Digested:
    """Both sides' work for a prompt, timed."""

    def __init__(self, token_ids: list[int]) -> None:
        begun = time.perf_counter()
        self.there: Prompt = pickle.loads(pickle.dumps(Prompt(token_ids)))
        self.there.whole  # noqa: B018  what prefill's answer names
        self.here: PromptDigest = Prompt(token_ids).whole
        self.seconds = time.perf_counter() - begun


def hand_over(
    prefill: Side, decode: Side, name: str, token_ids: list[int], *, bound: bool
) -> tuple[float, float]:
    """Seconds of the whole, and of the prompt's part."""
    ended: queue.Queue[Outcome] = queue.Queue()
    pages = -(-len(token_ids) // PAGE)
    begun = time.perf_counter()
    digested = Digested(token_ids) if bound else None
    source = PagedSource(prefill.view)
    source.set_pages(0, np.arange(pages))
    source.advance(0, slice(None), pages)
    terms = OfferTerms(prompt=digested.there if digested else None)
    prefill.core.offer(name, source, lambda _: None, terms)
    prefill.core.finish(name)
    target = PagesTarget(decode.view, (one_run(0, 0, np.arange(pages), range(len(token_ids))),))
    wanted = Wanted(name, target, True, 60.0, prompt=digested.here if digested else UNBOUND)
    decode.core.subscribe(PeerAddress(prefill.core.engine_id, 0, prefill.core.addresses), wanted, ended.put)
    outcome = ended.get(timeout=60)
    if not outcome.ok:
        raise SystemExit(f"a hand-over failed: {outcome.error}")
    return time.perf_counter() - begun, digested.seconds if digested else 0.0


def measure(tokens: int, rounds: int) -> dict[str, Any]:
    prefill, decode = Side(-(-tokens // PAGE)), Side(-(-tokens // PAGE))
    figures: dict[bool, list[float]] = {True: [], False: []}
    digests = []
    try:
        for number in range(rounds + 2):
            token_ids = [random.randrange(VOCABULARY) for _ in range(tokens)]
            order = (True, False) if number % 2 else (False, True)
            for bound in order:
                taken, digest = hand_over(prefill, decode, f"{number}-{bound}", token_ids, bound=bound)
                if number >= 2:  # the first ones warm up
                    figures[bound].append(taken)
                    digests += [digest] if bound else []
    finally:
        decode.core.close()
        prefill.core.close()
    unbound = median(figures[False])
    return {
        "bound_ms": median(figures[True]) * 1e3,
        "unbound_ms": unbound * 1e3,
        "ratio": median(a / b for a, b in zip(figures[True], figures[False], strict=True)),
        "digest_us": median(digests) * 1e6,
        "share": median(digests) / unbound,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default="2048,32768")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    given = parser.parse_args()
    found = {tokens: measure(int(tokens), given.rounds) for tokens in given.tokens.split(",")}
    if given.json:
        print(json.dumps(found))
        return
    for tokens, one in found.items():
        print(
            f"{tokens} tokens: {one['bound_ms']:.2f} ms bound, {one['unbound_ms']:.2f} ms not, ratio "
            f"{one['ratio']:.4f}; the digests take {one['digest_us']:.0f} µs, {one['share']:.2%} of a hand-over"
        )


if __name__ == "__main__":
    main()
