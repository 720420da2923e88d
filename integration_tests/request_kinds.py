# SPDX-License-Identifier: Apache-2.0
"""Kinds of requests that users send, each against a single server's tokens, in both orders of dispatch.

A kind asks a pair of servers (``request_pair.py``) and says which answers are right.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from integration_tests.cluster import PREFILL_PARAMS, gauges
from integration_tests.request_models import embedded, pictured
from integration_tests.request_pair import (
    TOKENS,
    Dispatch,
    Pair,
    Row,
    Sent,
    ask,
    choices,
    completion,
    held,
    judge,
    prompt_of,
)
from sage_kv_connector.launch.process import ServerError

#: Kinds in which every answer is handed over, and those in which nothing may be.
ALL_HANDED_OVER = {
    "one prompt", "list of prompts", "the same prompt twice in a list", "n = 3", "chat, n = 2", "each LoRA adapter",
    "prompt embeddings", "an image",
}  # fmt: skip
ALL_REFUSED = {
    "another prompt's parameters", "another cache salt", "another LoRA adapter's KV", "another prompt's embeddings",
    "another image of the same size",
}  # fmt: skip

Kind = Callable[[Pair, Dispatch, Row], None]
#: Those that any pair of servers can be asked.
KINDS: dict[str, Kind] = {}
#: Those that need servers of their own (``request_setups.py``).
SPECIAL: dict[str, Kind] = {}


def kind(name: str, *, special: bool = False) -> Callable[[Kind], Kind]:
    def register(function: Kind) -> Kind:
        (SPECIAL if special else KINDS)[name] = function
        return function

    return register


@kind("one prompt")
def _plain(pair: Pair, dispatch: Dispatch, row: Row) -> None:
    for tokens in (1, 127, 128, 129, 700):
        sent = completion(prompt_of(tokens))
        judge(row, pair, dispatch, sent, lambda sent=sent: pair.hand_over(sent, dispatch))  # type: ignore[misc]


@kind("list of prompts")
def _batch(pair: Pair, dispatch: Dispatch, row: Row) -> None:
    head = prompt_of(300)
    for prompts in (
        [prompt_of(400), prompt_of(400), prompt_of(250)],
        [head + prompt_of(40), head + prompt_of(90)],
    ):
        sent = completion(prompts)
        judge(row, pair, dispatch, sent, lambda sent=sent: pair.hand_over(sent, dispatch))  # type: ignore[misc]


@kind("the same prompt twice in a list")
def _twice(pair: Pair, dispatch: Dispatch, row: Row) -> None:
    prompt = prompt_of(400)
    sent = completion([prompt, prompt])
    judge(row, pair, dispatch, sent, lambda: pair.hand_over(sent, dispatch))


@kind("n = 3")
def _samples(pair: Pair, dispatch: Dispatch, row: Row) -> None:
    sent = completion(prompt_of(400), n=3, temperature=1.0, seed=7)
    judge(row, pair, dispatch, sent, lambda: pair.hand_over(sent, dispatch))


@kind("chat, n = 2")
def _chat(pair: Pair, dispatch: Dispatch, row: Row) -> None:
    text = "".join(random.choice("abcdefgh ") for _ in range(300))
    body = {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": TOKENS,
        "n": 2,
        "temperature": 1.0,
        "seed": 3,
    }
    sent = Sent("/v1/chat/completions", body, [])
    judge(row, pair, dispatch, sent, lambda: pair.hand_over(sent, dispatch))


@kind("n on decode only")
def _samples_on_decode(pair: Pair, dispatch: Dispatch, row: Row) -> None:
    sent = completion(prompt_of(400), n=2, temperature=1.0, seed=7)
    judge(row, pair, dispatch, sent, lambda: pair.hand_over(sent, dispatch, on_prefill={"n": 1}))


def _others() -> Iterator[tuple[str, list[int], list[int]]]:
    """(how they differ, the prompt that is prefilled, the one that is decoded)."""
    x = prompt_of(500)
    yield "same length", x, prompt_of(500)
    yield "longer", x, prompt_of(800)
    yield "shorter", x, prompt_of(200)
    yield "same beginning", x, x[:300] + prompt_of(200)
    yield "goes on", x[:400], x
    yield "ends earlier", x, x[:300]
    yield "last token differs", x, [*x[:-1], x[-1] % 255 + 1]


@kind("another prompt's parameters")
def _poison(pair: Pair, dispatch: Dispatch, row: Row) -> None:
    for _, x, y in _others():
        sent = completion(y)
        judge(
            row,
            pair,
            dispatch,
            sent,
            lambda sent=sent, x=x: pair.hand_over(sent, dispatch, on_prefill={"prompt": x}),  # type: ignore[misc]
        )


@kind("truncated on one side")
def _truncated(pair: Pair, dispatch: Dispatch, row: Row) -> None:
    for on_prefill in (True, False):
        prompt = prompt_of(500)
        cut = {"truncate_prompt_tokens": 300}
        sent = completion(prompt, **({} if on_prefill else cut))
        other = cut if on_prefill else {"truncate_prompt_tokens": None}
        judge(
            row,
            pair,
            dispatch,
            sent,
            lambda sent=sent, other=other: pair.hand_over(sent, dispatch, on_prefill=other),  # type: ignore[misc]
        )


@kind("another cache salt")
def _salt(pair: Pair, dispatch: Dispatch, row: Row) -> None:
    sent = completion(prompt_of(500), cache_salt="b")
    judge(row, pair, dispatch, sent, lambda: pair.hand_over(sent, dispatch, on_prefill={"cache_salt": "a"}))


@kind("parameters used twice")
def _again(pair: Pair, dispatch: Dispatch, row: Row) -> None:
    prompts = [prompt_of(500), prompt_of(500)]
    params = ask(
        pair.prefill,
        "/v1/completions",
        {"prompt": prompts[0], "max_tokens": 1, "kv_transfer_params": PREFILL_PARAMS},
    )["kv_transfer_params"]
    for prompt in (prompts[0], prompts[1], prompts[0]):
        sent = completion(prompt)
        body = {**sent.body, "kv_transfer_params": dict(params)}
        judge(row, pair, dispatch, sent, lambda sent=sent, body=body: ask(pair.decode, sent.path, body))  # type: ignore[misc]


@kind("other weights of the same shape")
def _other_weights(pair: Pair, dispatch: Dispatch, row: Row) -> None:
    if pair.stranger is None:
        return
    strange = Pair(pair.stranger[0], pair.decode, pair.alone, pair.stranger[1])
    sent = completion(prompt_of(500))
    judge(row, pair, dispatch, sent, lambda: strange.hand_over(sent, dispatch))
    row.held |= {f"stranger.{name}": value for name, value in held(strange).items() if "prefill" in name}


BAD_ADDRESSES = (
    "ftp://x",
    "http://",
    "http://127.0.0.1:1",
    "http://127.0.0.1:99999",
    "http:// ",
    "http://a b:80",
    "http://[::1",
)


@kind("an address that is none")
def _bad_address(pair: Pair, dispatch: Dispatch, row: Row) -> None:
    for address in BAD_ADDRESSES:
        sent = completion(prompt_of(200))
        params = pair.both()[1] | {"remote_bootstrap_addr": address}
        body = {**sent.body, "kv_transfer_params": params}
        judge(row, pair, dispatch, sent, lambda sent=sent, body=body: ask(pair.decode, sent.path, body, 40.0))  # type: ignore[misc]


@kind("two requests with one's parameters at once")
def _second_subscriber(pair: Pair, dispatch: Dispatch, row: Row) -> None:
    """Another prompt's request subscribes beside the one that the parameters are for."""
    x, y = prompt_of(500), prompt_of(500)
    if dispatch == "sequential":
        first = {"prompt": x, "max_tokens": 1, "kv_transfer_params": PREFILL_PARAMS}
        params = ask(pair.prefill, "/v1/completions", first)["kv_transfer_params"]
    else:
        prefill_params, params = pair.both()
    requests = [completion(x), completion(y)]

    def asked(sent: Sent) -> dict[str, Any]:
        return ask(pair.decode, sent.path, {**sent.body, "kv_transfer_params": dict(params)})

    began = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        if dispatch == "concurrent":
            first = {"prompt": x, "max_tokens": 1, "kv_transfer_params": prefill_params}
            pool.submit(ask, pair.prefill, "/v1/completions", first)
        answers = [pool.submit(asked, sent) for sent in requests]
    row.seconds = round(time.monotonic() - began, 2)
    for sent, answer in zip(requests, answers, strict=True):
        judge(row, pair, dispatch, sent, answer.result)


# -- kinds that need servers of their own


@kind("each LoRA adapter", special=True)
def _adapters(pair: Pair, dispatch: Dispatch, row: Row) -> None:
    prompt = prompt_of(500)
    for model in ("a", "b", "model"):
        sent = completion(prompt, model=model)
        judge(row, pair, dispatch, sent, lambda sent=sent: pair.hand_over(sent, dispatch))  # type: ignore[misc]


@kind("another LoRA adapter's KV", special=True)
def _another_adapter(pair: Pair, dispatch: Dispatch, row: Row) -> None:
    for there, here in (("a", "b"), ("model", "a"), ("a", "model")):
        sent, other = completion(prompt_of(500), model=here), {"model": there}
        judge(
            row,
            pair,
            dispatch,
            sent,
            lambda sent=sent, other=other: pair.hand_over(sent, dispatch, on_prefill=other),  # type: ignore[misc]
        )


@kind("prompt embeddings", special=True)
def _embeddings(pair: Pair, dispatch: Dispatch, row: Row) -> None:
    for tokens in (100, 300):
        sent = embedded(tokens)
        judge(row, pair, dispatch, sent, lambda sent=sent: pair.hand_over(sent, dispatch))  # type: ignore[misc]


@kind("another prompt's embeddings", special=True)
def _other_embeddings(pair: Pair, dispatch: Dispatch, row: Row) -> None:
    sent, other = embedded(300), embedded(300).body
    judge(row, pair, dispatch, sent, lambda: pair.hand_over(sent, dispatch, on_prefill=other))


@kind("an image", special=True)
def _image(pair: Pair, dispatch: Dispatch, row: Row) -> None:
    for _ in range(2):
        sent = pictured()
        judge(row, pair, dispatch, sent, lambda sent=sent: pair.hand_over(sent, dispatch))  # type: ignore[misc]


@kind("another image of the same size", special=True)
def _other_image(pair: Pair, dispatch: Dispatch, row: Row) -> None:
    sent, other = pictured(), pictured().body
    judge(row, pair, dispatch, sent, lambda: pair.hand_over(sent, dispatch, on_prefill=other))


@kind("parameters from before a restart of prefill", special=True)
def _restart(pair: Pair, dispatch: Dispatch, row: Row) -> None:
    x, y = prompt_of(500), prompt_of(500)
    prefill_params, params = pair.both()
    first = {"prompt": x, "max_tokens": 1, "kv_transfer_params": PREFILL_PARAMS}
    if dispatch == "sequential":
        params = ask(pair.prefill, "/v1/completions", first)["kv_transfer_params"]
    pair.prefill.stop()
    pair.prefill.start()
    pair.prefill.wait_until_healthy()
    for prompt in (y, x):
        if dispatch == "concurrent":  # a router may still name the engine that was there before
            ask(pair.prefill, "/v1/completions", first | {"kv_transfer_params": prefill_params})
        sent = completion(prompt)
        body = {**sent.body, "kv_transfer_params": dict(params)}
        judge(row, pair, dispatch, sent, lambda sent=sent, body=body: ask(pair.decode, sent.path, body))  # type: ignore[misc]
    sent = completion(x)
    judge(row, pair, dispatch, sent, lambda: pair.hand_over(sent, dispatch))


@kind("prefill restarted", special=True)
def _restarted(pair: Pair, dispatch: Dispatch, row: Row) -> None:
    """A router remembers where the prefill was that is there no more."""
    judge(row, pair, dispatch, sent := completion(prompt_of(500)), lambda: pair.hand_over(sent, dispatch))
    pair.prefill.stop()
    pair.prefill.start()
    pair.prefill.wait_until_healthy()
    for _ in range(3):
        sent = completion(prompt_of(500))
        judge(row, pair, dispatch, sent, lambda sent=sent: pair.hand_over(sent, dispatch))  # type: ignore[misc]


@kind("prefix caches reset with running requests", special=True)
def _reset(pair: Pair, dispatch: Dispatch, row: Row) -> None:
    over = threading.Event()

    def reset() -> None:
        while not over.wait(0.15):
            for server in (pair.prefill, pair.decode):
                # vLLM answers 500 while a request waits for KV, and resets what it can.
                with suppress(ServerError):
                    ask(server, "/reset_prefix_cache?reset_running_requests=true", {}, empty=True)

    head = prompt_of(256)
    requests = [completion(head + prompt_of(400)) for _ in range(8)]
    right = [choices(ask(pair.alone, sent.path, sent.body)) for sent in requests]
    resets = threading.Thread(target=reset)
    resets.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda sent: pair.hand_over(sent, dispatch), requests))
    finally:
        over.set()
        resets.join()
    if [choices(answer) for answer in answers] != right:
        row.wrong("other tokens than one server's")
    for sent in requests[:3]:
        judge(row, pair, dispatch, sent, lambda sent=sent: pair.hand_over(sent, dispatch))  # type: ignore[misc]


def run(pair: Pair, name: str, dispatch: Dispatch, way: str = "by hand", *, spread: bool = False) -> Row:
    """``spread``: of a request with several prompts some may be computed by decode."""
    row = Row(name, "vllm", way, dispatch)
    try:
        before = gauges(pair.decode).get("failed_loads", 0)
        (KINDS | SPECIAL)[name](pair, dispatch, row)
        row.held |= held(pair)
        row.refused = int(gauges(pair.decode).get("failed_loads", 0) - before)
        if row.refused and name in ALL_HANDED_OVER and not spread:
            row.wrong(f"{row.refused} loads failed, though prefill had what they asked for")
        if not row.refused and name in ALL_REFUSED:
            row.wrong("KV of another prompt was loaded")
    except ServerError as error:
        row.wrong(f"a server was lost: {error}")
    return row
