# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench tpot``: what a request that runs on decode notices of others that are handed over meanwhile.

Two real servers. Each round times one long answer three times: alone; while other requests come whose KV is handed
over; and while the same ones come again, which decode answers from its own cache. The others cost the engine the same
steps in both, so the ratio of these two is what the hand-overs took.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from sage_kv_connector.bench.server_pairs import (
    ServerPair,
    random_prompt,
    servers_env,
    start_pairs,
    with_baselines,
)
from sage_kv_connector.console import progress
from sage_kv_connector.launch.process import ServerError
from sage_kv_connector.launch.tiny_model import SHAPES
from sage_kv_connector.launch.vllm import PREFILL_PARAMS, complete, judged, metric

#: The answer that is timed.
RUNNING_PROMPT, RUNNING_TOKENS = 16, 300
LANDED = "vllm:sage_kvt_transferred_bytes_total"

#: A prompt, and what prefill answered to it.
Other = tuple[list[int], dict[str, Any] | None]


def bench_tpot(tokens: int, a_second: float, rounds: int, backend: str) -> dict[str, Any]:
    """``to_cached`` and ``to_alone``: TPOT beside hand-overs, over that beside cached requests and that of no others.

    Medians over rounds, of ratios within a round. ``right``: the answers from both sources are equal
    wherever the model is sure of them, and all KV of the others landed. Raises ServerError where a server fails.
    """
    with_baselines("the comparison is")
    from baselines.sides import PeerPair, ServerSide

    ours = ServerSide(f"sage_kvt:backend={backend},host=127.0.0.1")
    with tempfile.TemporaryDirectory(prefix="sage-kvt-bench-") as name, ExitStack() as stack:
        wanted = {"ours": PeerPair(ours, ours)}
        (pair,) = start_pairs(wanted, wanted, tokens, servers_env(), Path(name), stack, {})
        done = []
        with pair.turn():
            for number in range(rounds + 1):
                done.append(_round(pair, tokens, a_second))
                progress.print(f"round {number} of {rounds}: {_text(done[-1])}")
    done = done[1:]  # the first warms up
    return {
        "backend": backend,
        "tokens": tokens,
        "a_second": a_second,
        "rounds": rounds,
        "handed_over": sum(r["others"] for r in done),
        **{name: median(r[name] for r in done) for name in ("alone_ms", "handed_over_ms", "cached_ms")},
        "to_cached": median(r["handed_over_ms"] / r["cached_ms"] for r in done),
        "to_alone": median(r["handed_over_ms"] / r["alone_ms"] for r in done),
        "right": all(r["right"] for r in done),
    }


def _round(pair: ServerPair, tokens: int, a_second: float) -> dict[str, Any]:
    alone_ms, _ = _beside(pair, [], a_second)
    count = max(1, int(alone_ms * RUNNING_TOKENS / 1e3 * a_second))
    prompts = [random_prompt(tokens) for _ in range(count)]
    offered = [
        complete(pair.prefill.url, one, max_tokens=1, kv_transfer_params=PREFILL_PARAMS, stream=False)
        for one in prompts
    ]
    before = metric(pair.decode, LANDED)
    handed_over = [(one, answer.kv_transfer_params) for one, answer in zip(prompts, offered, strict=True)]
    handed_over_ms, answers = _beside(pair, handed_over, a_second)
    cached_ms, again = _beside(pair, [(one, None) for one in prompts], a_second)
    landed = metric(pair.decode, LANDED) - before
    differ = [prompt for prompt, one, other in zip(prompts, answers, again, strict=True) if one != other]
    right = not any(judged(pair.decode.url, prompt, 1).sure for prompt in differ)
    return {
        "alone_ms": alone_ms,
        "handed_over_ms": handed_over_ms,
        "cached_ms": cached_ms,
        "others": count,
        "right": right and landed >= count * tokens * SHAPES["bench"].kv_bytes_per_token,
    }


def _beside(pair: ServerPair, others: Sequence[Other], a_second: float) -> tuple[float, list[list[int]]]:
    """Milliseconds a token of the long answer while ``others`` are asked at that rate; and what they answered."""
    answers: list[list[int]] = [[] for _ in others]
    failed: list[Exception] = []

    def ask(number: int, prompt: list[int], params: dict[str, Any] | None) -> None:
        try:
            answers[number] = complete(
                pair.decode.url, prompt, max_tokens=1, kv_transfer_params=params
            ).token_ids
        except ServerError as error:
            failed.append(error)

    def all_others() -> None:
        asked = []
        begun = time.monotonic()
        for number, (prompt, params) in enumerate(others):
            time.sleep(max(0.0, begun + number / a_second - time.monotonic()))
            asked.append(threading.Thread(target=ask, args=(number, prompt, params)))
            asked[-1].start()
        for thread in asked:
            thread.join()

    beside = threading.Thread(target=all_others)
    beside.start()
    running = complete(pair.decode.url, random_prompt(RUNNING_PROMPT), max_tokens=RUNNING_TOKENS)
    beside.join()
    if failed:
        raise failed[0]
    return (running.total_s - running.ttft_s) / (RUNNING_TOKENS - 1) * 1e3, answers


def _text(figures: dict[str, Any]) -> str:
    return (
        f"{figures['alone_ms']:.2f} ms a token alone, {figures['handed_over_ms']:.2f} beside hand-overs, "
        f"{figures['cached_ms']:.2f} beside cached requests"
    )


def tpot_rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The result as a table for people."""
    yield f"others, {result['a_second']:g} a second", f"{result['tokens']} tokens over {result['backend']}"
    yield "prefill attention", "stubbed on both servers"
    yield "a running request", _text(result)
    text = f"{result['to_cached']:.3f} of beside cached requests, {result['to_alone']:.3f} of alone"
    yield "beside hand-overs", text + ("" if result["right"] else ", WRONG ANSWERS")
