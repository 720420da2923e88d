# SPDX-License-Identifier: Apache-2.0
"""A prefill and a decode server that are asked as a router asks them, and what a single server would have said.

What a request leaves behind counts as well: whether decode's own answers to its prompts are still right afterwards,
whether both servers hold nothing any more.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from integration_tests.cluster import PREFILL_PARAMS, gauges
from sage_kv_connector.launch.process import Process, ServerError

Dispatch = Literal["sequential", "concurrent"]
#: What routers and orchestrators that ask prefill first send it: the keys of vLLM's NIXL connector.
NIXL_SHAPED = {
    **PREFILL_PARAMS,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
#: A request that took this much longer than the same one on a single server has waited for something.
STALL_S = 3.0
TOKENS = 8
#: The small models have none; servers are started with it.
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


#: Of a request, what must be the same when its prompt is asked again.
KEPT = ("cache_salt", "model")


class Sent(NamedTuple):
    """A request as a client writes it, and the prompts that must be right for everybody afterwards."""

    path: str
    body: dict[str, Any]
    prompts: list[list[int]]

    def afterwards(self) -> list[Sent]:
        """Each prompt by itself; where there is none, the request once more."""
        kept = {key: self.body[key] for key in KEPT if key in self.body}
        return [completion(prompt, **kept) for prompt in self.prompts] or [self]


@dataclass
class Row:
    """One kind in one order of dispatch. ``way``: how the servers were run and asked.

    ``refused``: loads of decode that failed. ``held``: what the servers still had ten seconds later.
    """

    name: str
    engine: str
    way: str
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

    ``alone``: the judge. ``stranger``: a prefill whose model has other weights, and its bootstrap server. ``fronts``:
    routers to ask instead of the servers. ``dp_size``: data parallel ranks of prefill.
    """

    prefill: Process
    decode: Process
    alone: Process
    bootstrap: str
    stranger: tuple[Process, str] | None = None
    fronts: Mapping[Dispatch, Process] = field(default_factory=dict)
    dp_size: int = 1

    def hand_over(
        self, sent: Sent, dispatch: Dispatch, *, on_prefill: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """What decode answers. ``on_prefill``: what differs in the request that prefill gets."""
        if dispatch in self.fronts:
            return ask(self.fronts[dispatch], sent.path, sent.body)
        first = {**sent.body, **(on_prefill or {}), "max_tokens": 1}
        if dispatch == "sequential":
            asked = {**first, "kv_transfer_params": NIXL_SHAPED}
            params = ask(self.prefill, sent.path, asked)["kv_transfer_params"]
            return ask(self.decode, sent.path, {**sent.body, "kv_transfer_params": params})
        dp_rank = random.randrange(self.dp_size)
        prefill_params, decode_params = self.both(dp_rank)
        to_rank = {"X-data-parallel-rank": str(dp_rank)} if self.dp_size > 1 else {}
        thread = threading.Thread(
            target=_quietly,
            args=(self.prefill, sent.path, {**first, "kv_transfer_params": prefill_params}, to_rank),
        )
        thread.start()
        try:
            return ask(self.decode, sent.path, {**sent.body, "kv_transfer_params": decode_params})
        finally:
            thread.join()

    def both(self, dp_rank: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parameters of a request that is sent to both servers at once."""
        transfer = f"xfer-{random.getrandbits(64):x}"
        engine = self.engine_id(dp_rank)
        return {**PREFILL_PARAMS, "transfer_id": transfer}, {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": transfer,
            "remote_engine_id": engine,
            "remote_bootstrap_addr": self.bootstrap,
        }

    def engine_id(self, dp_rank: int = 0) -> str:
        connection = http.client.HTTPConnection(self.bootstrap.removeprefix("http://"), timeout=10)
        connection.request("GET", "/query")
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
        return str(answer[str(dp_rank)]["engine_id"])


def ask(
    server: Process,
    path: str,
    body: dict[str, Any],
    timeout_s: float = 120.0,
    headers: Mapping[str, str] | None = None,
    *,
    empty: bool = False,
) -> dict[str, Any]:
    """One request, answered at once (``empty``: without a body). Raises ServerError for any but a good answer."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=timeout_s)
    whole = {"model": "model", "temperature": 0, "ignore_eos": True, "return_token_ids": True, **body}
    try:
        connection.request(
            "POST", path, json.dumps(whole), {"Content-Type": "application/json", **(headers or {})}
        )
        response = connection.getresponse()
        text = response.read()
        if response.status != 200:
            raise ServerError(
                f"{server.url}{path} answered {response.status}: {text[:500].decode(errors='replace')}"
            )
        answer: dict[str, Any] = {} if empty else json.loads(text)
        return answer
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(f"{server.url}{path}: {type(error).__name__}: {error}") from error
    finally:
        connection.close()


def _quietly(server: Process, path: str, body: dict[str, Any], headers: Mapping[str, str]) -> None:
    """Prefill's own answer is nobody's concern."""
    try:
        ask(server, path, body, headers=headers)
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
    for again in sent.afterwards():
        try:
            if choices(ask(pair.decode, again.path, again.body)) != choices(
                ask(pair.alone, again.path, again.body)
            ):
                row.wrong("decode's own answer is wrong afterwards")
        except ServerError as error:
            row.wrong(f"afterwards: {error}")


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
