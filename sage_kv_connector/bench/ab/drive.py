# SPDX-License-Identifier: Apache-2.0
"""One load, sent to one arm; then some of its answers, judged by one server."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from typing import Any

from sage_kv_connector.bench.ab.loads import Queue, Request
from sage_kv_connector.bench.server_pairs import ServerPair
from sage_kv_connector.launch.process import ServerError
from sage_kv_connector.launch.vllm import complete, judged

#: Tokens of an answer. Decode's first comes with the hand-over, the others say TPOT.
ANSWER_TOKENS = 8

#: ``begun_s``: from the load's begin; ``error``, or what ``ServerPair`` says of a request, and ``ended_s``.
Done = dict[str, Any]


def drive(pair: ServerPair, queues: Sequence[Queue], dispatch: str) -> list[Done]:
    """Every request of every queue, each queue by a client of its own; in the order of the queues."""
    hand_over = {"sequential": pair.sequential, "concurrent": pair.concurrent}[dispatch]
    done: list[list[Done]] = [[] for _ in queues]
    begun = time.perf_counter()

    def client(queue: Queue, answers: list[Done]) -> None:
        for request in queue:
            if request.at_s is not None:
                time.sleep(max(0.0, begun + request.at_s - time.perf_counter()))
            one: Done = {"begun_s": time.perf_counter() - begun, "prompt_tokens": len(request.prompt)}
            try:
                one |= hand_over(request.prompt, ANSWER_TOKENS)
            except (ServerError, OSError, LookupError, ValueError) as error:  # a peer may answer anything
                one["error"] = str(error)[:300]
            answers.append(one | {"ended_s": time.perf_counter() - begun})

    clients = [
        threading.Thread(target=client, args=(queue, answers))
        for queue, answers in zip(queues, done, strict=True)
    ]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    return [one for answers in done for one in answers]


def wrong_answers(done: Sequence[Done], *, lossless: bool) -> int | None:
    """Judged ones that one server is sure of and that differ from its own; none is wrong where bits may be lost."""
    return sum(one["equal"] < 1 and one["sure"] for one in done if "equal" in one) if lossless else None


def judge(
    pair: ServerPair, queues: Sequence[Queue], done: Sequence[Done], most: int, source: random.Random
) -> None:
    """Adds ``equal`` (share of its tokens), ``margin`` and ``sure`` to at most ``most`` answers.

    Prefill's server is asked twice: the first time it computes what it has evicted, the second time one token, as
    decode did.
    """
    asked: list[Request] = [request for queue in queues for request in queue]
    answered = [both for both in zip(asked, done, strict=True) if "error" not in both[1]]
    for request, one in source.sample(answered, min(most, len(answered))):
        complete(pair.prefill.url, request.prompt, max_tokens=1)
        alone = judged(pair.prefill.url, request.prompt, ANSWER_TOKENS)
        equal = sum(mine == its for mine, its in zip(one["token_ids"], alone.token_ids, strict=False))
        one |= {"equal": equal / ANSWER_TOKENS, "margin": alone.margin, "sure": alone.sure}
