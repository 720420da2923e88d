# SPDX-License-Identifier: Apache-2.0
"""Kinds of requests that one engine prefills and the other decodes, asked at both servers at once.

SGLang computes the prompt of a request with ``n`` > 1 once by itself before its samples, and in the same room:
it uses the room once more than vLLM does. So a vLLM prefill must be asked for one sample more than SGLang is to
decode, and an SGLang prefill for one; then vLLM computes the other samples.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

from integration_tests import request_pair
from integration_tests.cluster import PREFILL_PARAMS, gauges
from integration_tests.request_pair import STALL_S, TOKENS, Pair, Row, held
from integration_tests.request_sglang import Answers, ask, body_of, prompt_of
from sage_kv_connector.launch.process import Process, ServerError
from sage_kv_connector.launch.sglang import SglangProcess, room_at

#: Greedy in both engines; vLLM refuses ``n`` > 1 at temperature 0.
GREEDY = {"temperature": 1.0, "top_k": 1}


class CrossPair(NamedTuple):
    """vLLM does both; ``bootstrap_port`` is that of its prefill."""

    vllm: Process
    bootstrap_port: int
    prefill: SglangProcess
    decode: SglangProcess


def _in_vllm(pair: CrossPair, prompt: list[int], n: int, **more: Any) -> Answers:
    body = {"prompt": prompt, "n": n, "max_tokens": TOKENS, **GREEDY, **more}
    return [one["token_ids"] for one in request_pair.ask(pair.vllm, "/v1/completions", body)["choices"]]


def _to_sglang(pair: CrossPair, prompt: list[int], n: int, on_prefill: int) -> Answers:
    """``on_prefill``: the samples that prefill is asked for."""
    room = room_at(pair.bootstrap_port)
    params = {**PREFILL_PARAMS, "bootstrap_room": room["bootstrap_room"]}
    with ThreadPoolExecutor(1) as pool:
        pool.submit(_in_vllm, pair, prompt, on_prefill, max_tokens=1, kv_transfer_params=params)
        return ask(pair.decode, {**body_of(prompt, n=n, **GREEDY), **room}, 40.0)


def _to_vllm(pair: CrossPair, prompt: list[int], n: int, on_prefill: int) -> Answers:
    room = room_at(pair.prefill.bootstrap_port)
    params = {"do_remote_prefill": True, "do_remote_decode": False, **room}

    def prefilled() -> None:
        with suppress(ServerError):  # what nobody fetches ends with its lease
            ask(pair.prefill, {**body_of(prompt, n=on_prefill, max_new_tokens=1, **GREEDY), **room}, 40.0)

    # Its own answer may come with a lease's end, long after decode's.
    threading.Thread(target=prefilled, daemon=True).start()
    return _in_vllm(pair, prompt, n, kv_transfer_params=params)


HandOver = Callable[[CrossPair, list[int], int, int], Answers]


def _handed_over(pair: CrossPair, row: Row, hand_over: HandOver, n: int, on_prefill: int) -> None:
    for tokens in (90, 331, 1024):
        prompt = prompt_of(tokens)
        right = _in_vllm(pair, prompt, n)
        began = time.monotonic()
        try:
            if hand_over(pair, prompt, n, on_prefill) != right:
                row.wrong("other tokens than one server's")
        except ServerError as error:
            row.wrong(str(error))
        took = time.monotonic() - began
        row.seconds = round(max(row.seconds, took), 2)
        row.stalls += took > STALL_S


def _one_use_short(pair: CrossPair, row: Row) -> None:
    """vLLM is asked for as many samples as SGLang, so the last one finds nothing, and hears why."""
    began = time.monotonic()
    try:
        _to_sglang(pair, prompt_of(331), 2, 2)
        row.wrong("SGLang took KV that was not there")
    except ServerError as error:
        if "no prefill with this transfer id" not in str(error):
            row.wrong(f"the reason is not named: {error}")
    row.seconds, row.refused = round(time.monotonic() - began, 2), 1
    prompt = prompt_of(331)
    if _to_sglang(pair, prompt, 1, 1) != _in_vllm(pair, prompt, 1):
        row.wrong("the next request's tokens are wrong")


TO_SGLANG, TO_VLLM = "vLLM prefills, SGLang decodes", "SGLang prefills, vLLM decodes"
#: (way, kind) → how it is asked.
KINDS: dict[tuple[str, str], Callable[[CrossPair, Row], None]] = {
    (TO_SGLANG, "one prompt"): lambda pair, row: _handed_over(pair, row, _to_sglang, 1, 1),
    (TO_SGLANG, "n = 2, prefill asked for 3"): lambda pair, row: _handed_over(pair, row, _to_sglang, 2, 3),
    (TO_SGLANG, "n = 2, prefill asked for 2"): _one_use_short,
    (TO_VLLM, "one prompt"): lambda pair, row: _handed_over(pair, row, _to_vllm, 1, 1),
    (TO_VLLM, "n = 2, prefill asked for 1"): lambda pair, row: _handed_over(pair, row, _to_vllm, 2, 1),
    (TO_VLLM, "n = 2, prefill asked for 2"): lambda pair, row: _handed_over(pair, row, _to_vllm, 2, 2),
}


def run(pair: CrossPair, way: str, name: str) -> Row:
    row = Row(name, "both", way, "concurrent")
    try:
        before = gauges(pair.vllm).get("failed_loads", 0)
        KINDS[way, name](pair, row)
        row.held |= held(Pair(pair.vllm, pair.vllm, pair.vllm, ""))
        row.refused += int(gauges(pair.vllm).get("failed_loads", 0) - before)
        for server in (pair.vllm, pair.prefill, pair.decode):
            if server.popen is None or server.popen.poll() is not None:
                row.wrong(f"{server.name} ended")
    except ServerError as error:
        row.wrong(f"a server was lost: {error}")
    return row
