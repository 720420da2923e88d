# SPDX-License-Identifier: Apache-2.0
"""Kinds of requests that users send, each against a single server's tokens, in both orders of dispatch.

A kind asks a pair of servers and says which answers are right. What it leaves behind counts as well: whether decode's
own answers to the prompts it used are still right afterwards, whether both servers hold nothing any more.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from integration_tests.cluster import PREFILL_PARAMS, gauges
from sage_kv_connector.launch.process import Process, ServerError

Dispatch = Literal["sequential", "concurrent"]
#: A request that took this much longer than the same one on a single server has waited for something.
STALL_S = 3.0
TOKENS = 8
#: The small models have none; servers are started with it.
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


class Sent(NamedTuple):
    """A request as a client writes it, and the text of a prompt that must be right for everybody afterwards."""

    path: str
    body: dict[str, Any]
    prompts: list[list[int]]


@dataclass
class Row:
    """One kind in one order of dispatch.

    ``refused``: loads of decode that failed. ``held``: what the servers still had ten seconds later.
    """

    name: str
    engine: str
    dispatch: str
    right: bool = True
    seconds: float = 0.0
    stalls: int = 0
    refused: int = 0
    held: dict[str, float] = field(default_factory=dict)
    why: str = ""

    def wrong(self, why: str) -> None:
        self.right = False
        self.why = self.why or why


@dataclass
class Pair:
    """Two servers and, for concurrent dispatch, the prefill's bootstrap server.

    ``alone``: the judge. ``stranger``: a prefill whose model has other weights, and its bootstrap server.
    """

    prefill: Process
    decode: Process
    alone: Process
    bootstrap: str
    stranger: tuple[Process, str] | None = None

    def hand_over(
        self, sent: Sent, dispatch: Dispatch, *, on_prefill: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """What decode answers. ``on_prefill``: what differs in the request that prefill gets."""
        first = {**sent.body, **(on_prefill or {}), "max_tokens": 1}
        if dispatch == "sequential":
            params = ask(self.prefill, sent.path, {**first, "kv_transfer_params": PREFILL_PARAMS})[
                "kv_transfer_params"
            ]
            return ask(self.decode, sent.path, {**sent.body, "kv_transfer_params": params})
        prefill_params, decode_params = self.both()
        thread = threading.Thread(
            target=_quietly, args=(self.prefill, sent.path, {**first, "kv_transfer_params": prefill_params})
        )
        thread.start()
        try:
            return ask(self.decode, sent.path, {**sent.body, "kv_transfer_params": decode_params})
        finally:
            thread.join()

    def both(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parameters of a request that is sent to both servers at once."""
        transfer = f"xfer-{random.getrandbits(64):x}"
        engine = self.engine_id()
        return {**PREFILL_PARAMS, "transfer_id": transfer}, {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": transfer,
            "remote_engine_id": engine,
            "remote_bootstrap_addr": self.bootstrap,
        }

    def engine_id(self) -> str:
        connection = http.client.HTTPConnection(self.bootstrap.removeprefix("http://"), timeout=10)
        connection.request("GET", "/query")
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
        return str(answer["0"]["engine_id"])


def ask(server: Process, path: str, body: dict[str, Any], timeout_s: float = 120.0) -> dict[str, Any]:
    """One request that is answered at once. Raises ServerError for any answer but a good one."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=timeout_s)
    whole = {"model": "model", "temperature": 0, "ignore_eos": True, "return_token_ids": True, **body}
    try:
        connection.request("POST", path, json.dumps(whole), {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        if response.status != 200:
            raise ServerError(
                f"{server.url}{path} answered {response.status}: {text[:500].decode(errors='replace')}"
            )
        answer: dict[str, Any] = json.loads(text)
        return answer
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(f"{server.url}{path}: {type(error).__name__}: {error}") from error
    finally:
        connection.close()


def _quietly(server: Process, path: str, body: dict[str, Any]) -> None:
    """Prefill's own answer is nobody's concern."""
    try:
        ask(server, path, body)
    except ServerError:
        return


def choices(answer: dict[str, Any]) -> list[list[int]]:
    """Token ids of each choice, by its index."""
    return [one["token_ids"] for one in sorted(answer["choices"], key=lambda one: one["index"])]


def prompt_of(tokens: int) -> list[int]:
    return [random.randint(1, 255) for _ in range(tokens)]


def completion(prompt: Any, **more: Any) -> Sent:
    prompts = [list(one) for one in (prompt if isinstance(prompt[0], list) else [prompt])]
    return Sent("/v1/completions", {"prompt": prompt, "max_tokens": TOKENS, **more}, prompts)


def judge(row: Row, pair: Pair, dispatch: Dispatch, sent: Sent, answer: Callable[[], dict[str, Any]]) -> None:
    """Ask, compare with a single server, and ask decode itself afterwards."""
    began = time.monotonic()
    right = choices(ask(pair.alone, sent.path, sent.body))
    alone_s = time.monotonic() - began
    began = time.monotonic()
    try:
        if choices(answer()) != right:
            row.wrong("other tokens than one server's")
    except ServerError as error:
        row.wrong(str(error))
    took = time.monotonic() - began
    row.seconds = round(max(row.seconds, took), 2)
    row.stalls += took > alone_s + STALL_S
    for prompt in sent.prompts:
        again = completion(prompt, **{key: sent.body[key] for key in ("cache_salt",) if key in sent.body})
        try:
            if choices(ask(pair.decode, again.path, again.body)) != choices(
                ask(pair.alone, again.path, again.body)
            ):
                row.wrong("decode's own answer is wrong afterwards")
        except ServerError as error:
            row.wrong(f"afterwards: {error}")


# -- the kinds: each yields requests, and how it asks them


#: Kinds in which every answer is handed over, and those in which nothing may be.
ALL_HANDED_OVER = {"one prompt", "list of prompts", "the same prompt twice in a list", "n = 3", "chat, n = 2"}
ALL_REFUSED = {"another prompt's parameters", "another cache salt"}

Kind = Callable[[Pair, Dispatch, Row], None]
KINDS: dict[str, Kind] = {}


def kind(name: str) -> Callable[[Kind], Kind]:
    def register(function: Kind) -> Kind:
        KINDS[name] = function
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


def held(pair: Pair, timeout_s: float = 10.0) -> dict[str, float]:
    """What the servers still hold after some time; nothing, if all is well. vLLM reports with a step only."""
    until = time.monotonic() + timeout_s
    while True:
        for server in (pair.prefill, pair.decode):
            ask(server, "/v1/completions", {"prompt": prompt_of(8), "max_tokens": 2})
        time.sleep(0.3)
        names = ("offers", "on_offer", "loads", "subscriptions", "posts", "windows")
        left = {
            f"{role}.{name}": value
            for role, server in (("prefill", pair.prefill), ("decode", pair.decode))
            for name, value in gauges(server).items()
            if name in names and value
        }
        if not left or time.monotonic() > until:
            return left
        time.sleep(1.0)


def run(pair: Pair, name: str, dispatch: Dispatch, engine: str = "vllm") -> Row:
    row = Row(name, engine, dispatch)
    try:
        before = gauges(pair.decode).get("failed_loads", 0)
        KINDS[name](pair, dispatch, row)
        row.held |= held(pair)
        row.refused = int(gauges(pair.decode).get("failed_loads", 0) - before)
        if row.refused and name in ALL_HANDED_OVER:
            row.wrong(f"{row.refused} loads failed, though prefill had what they asked for")
        if not row.refused and name in ALL_REFUSED:
            row.wrong("KV of another prompt was loaded")
    except ServerError as error:
        row.wrong(f"a server was lost: {error}")
    return row
