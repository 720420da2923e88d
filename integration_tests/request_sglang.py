# SPDX-License-Identifier: Apache-2.0
"""Kinds of requests to a pair of real SGLang servers, through SGLang's own router and by hand.

SGLang sends each request to both servers at once, so there is one order of dispatch. Where decode has no way to
compute a prompt itself, a refusal is an error with a reason, and the server must live.
"""

from __future__ import annotations

import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

from integration_tests import request_pair
from integration_tests.recall import recall_prompt
from integration_tests.request_models import new_image
from integration_tests.request_pair import STALL_S, TOKENS, Row
from sage_kv_connector.launch.process import Process, ServerError
from sage_kv_connector.launch.sglang import SglangProcess, room_at


class SglangPair(NamedTuple):
    """``alone``: the judge. ``router``: None where both servers are asked by hand."""

    prefill: SglangProcess
    decode: SglangProcess
    alone: SglangProcess
    router: Process | None


Answers = list[list[int]]


def ask(server: Process, body: dict[str, Any], timeout_s: float = 60.0) -> Answers:
    """Token ids of each answer. Raises ServerError for any but a good one."""
    request = urllib.request.Request(
        f"{server.url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            answer = json.loads(response.read())
    except urllib.error.HTTPError as error:
        raise ServerError(f"{server.name} answered {error.code}: {error.read(500)!r}") from error
    except OSError as error:
        raise ServerError(f"{server.name}: {error}") from error
    found = answer if isinstance(answer, list) else [answer]
    for one in found:
        reason = one.get("meta_info", {}).get("finish_reason") or {}
        if reason.get("type") == "abort":
            raise ServerError(f"{server.name} aborted: {reason.get('message')}")
    return [one["output_ids"] for one in found]


def body_of(prompts: Any, **sampling: Any) -> dict[str, Any]:
    """``prompts``: token ids of one prompt, or of several."""
    params = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True, **sampling}
    return {"input_ids": prompts, "sampling_params": params}


def prompt_of(tokens: int) -> list[int]:
    """The model repeats what stands in its prompt, so wrong KV shows."""
    return recall_prompt(random.getrandbits(30), tokens)[0]


def _judge(row: Row, pair: SglangPair, body: dict[str, Any], answer: Callable[[], Answers]) -> None:
    began = time.monotonic()
    right = ask(pair.alone, body)
    alone_s = time.monotonic() - began
    began = time.monotonic()
    try:
        if answer() != right:
            row.wrong("other tokens than one server's")
    except ServerError as error:
        row.wrong(str(error))
    took = time.monotonic() - began
    row.seconds = round(max(row.seconds, took), 2)
    row.stalls += took > alone_s + STALL_S


def _handed_over(row: Row, pair: SglangPair, body: dict[str, Any]) -> None:
    router = pair.router
    _judge(row, pair, body, lambda: _both(pair, body, body) if router is None else ask(router, body))


def _one(pair: SglangPair, row: Row) -> None:
    for tokens in (100, 129, 700, 1024):
        _handed_over(row, pair, body_of(prompt_of(tokens)))


def _list(pair: SglangPair, row: Row) -> None:
    _handed_over(row, pair, body_of([prompt_of(400), prompt_of(600), prompt_of(250)]))


def _samples(pair: SglangPair, row: Row) -> None:
    for n in (2, 5):
        _handed_over(row, pair, body_of(prompt_of(400), n=n))


def _list_of_samples(pair: SglangPair, row: Row) -> None:
    _handed_over(row, pair, body_of([prompt_of(300), prompt_of(400)], n=2))


def _same_twice(pair: SglangPair, row: Row) -> None:
    prompt = prompt_of(400)
    _handed_over(row, pair, body_of([prompt, prompt]))


def _both(pair: SglangPair, on_prefill: dict[str, Any], on_decode: dict[str, Any]) -> Answers:
    """Two requests in one room, whatever they ask."""
    room = room_at(pair.prefill.bootstrap_port)

    def prefilled() -> None:
        with suppress(ServerError):
            ask(pair.prefill, {**on_prefill, **room}, 30.0)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(prefilled)
        return ask(pair.decode, {**on_decode, **room}, 30.0)


def _more_tokens(pair: SglangPair, row: Row) -> None:
    """Prefill truncated its prompt: decode hears both numbers at once."""
    long = prompt_of(700)
    began = time.monotonic()
    try:
        _both(pair, body_of(long[:300]), body_of(long))
        row.wrong("decode took KV that prefill does not have")
    except ServerError as error:
        if "tokens" not in str(error) and "pages" not in str(error):
            row.wrong(f"the numbers are not named: {error}")
    took = time.monotonic() - began
    row.seconds, row.refused = round(took, 2), 1
    row.stalls += took > STALL_S
    _handed_over(row, pair, body_of(prompt_of(300)))


def _bad_address(pair: SglangPair, row: Row) -> None:
    """An error, and the server lives. SGLang itself asks there first, for 14 s, and says nothing of the address."""
    for port in (1, 9):
        began = time.monotonic()
        room = room_at(port)
        try:
            ask(pair.decode, {**body_of(prompt_of(200)), **room}, 40.0)
            row.wrong("an answer without any prefill")
        except ServerError:
            pass
        row.seconds = round(max(row.seconds, time.monotonic() - began), 2)
        row.refused += 1
    _handed_over(row, pair, body_of(prompt_of(300)))


def _restart(pair: SglangPair, row: Row) -> None:
    """Prefill is started again on its ports; requests that follow are right."""
    pair.prefill.stop()
    pair.prefill.start()
    pair.prefill.wait_until_healthy()
    body = body_of(prompt_of(500))
    _judge(row, pair, body, lambda: _both(pair, body, body))
    _judge(row, pair, body, lambda: _both(pair, body, body))


def _adapters(pair: SglangPair, row: Row) -> None:
    """The same prompt with each adapter, and with none; for the model that the adapters are made for."""
    prompt = request_pair.prompt_of(500)
    answers = []
    for adapter in ("a", "b", None):
        body = body_of(prompt) | ({} if adapter is None else {"lora_path": adapter})
        _handed_over(row, pair, body)
        answers.append(ask(pair.alone, body))
    if any(answers.count(answer) > 1 for answer in answers):
        row.wrong("adapters do not change the answer, so nothing is shown")


def _images(pair: SglangPair, row: Row) -> None:
    """The same question about two images of one size."""
    answers = []
    for _ in range(2):
        body = body_of(None) | {"text": "[IMG]" + "what is it " * 30, "image_data": [new_image()]}
        del body["input_ids"]
        _handed_over(row, pair, body)
        answers.append(ask(pair.alone, body))
    if answers[0] == answers[1]:
        row.wrong("images do not change the answer, so nothing is shown")


KINDS: dict[str, Callable[[SglangPair, Row], None]] = {
    "one prompt": _one,
    "list of prompts": _list,
    "the same prompt twice in a list": _same_twice,
    "n = 2, n = 5": _samples,
    "list of prompts, n = 2": _list_of_samples,
    "truncated on prefill": _more_tokens,
    "an address that is none": _bad_address,
    "prefill restarted": _restart,
}
#: Those that need servers of their own (``request_sglang_setups.py``).
SPECIAL: dict[str, Callable[[SglangPair, Row], None]] = {
    "each LoRA adapter": _adapters,
    "two images of one size": _images,
}


def run(pair: SglangPair, name: str, way: str) -> Row:
    row = Row(name, "sglang", way, "concurrent")
    try:
        (KINDS | SPECIAL)[name](pair, row)
        for server in (pair.prefill, pair.decode):
            if server.popen is None or server.popen.poll() is not None:
                row.wrong(f"{server.name} ended")
    except ServerError as error:
        row.wrong(f"a server was lost: {error}")
    return row
