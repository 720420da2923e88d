# SPDX-License-Identifier: Apache-2.0
"""The load and the faults of ``telemetry_vllm`` on SGLang's servers. Runs in SGLang's own environment.

A hand-over there is two transfers: the KV pages, and the row of metadata with the first token. A room fails once,
whichever of its two transfers fails first.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from integration_tests.cluster import new_prompt
from integration_tests.fault_sglang import say_version
from integration_tests.scraped import named
from integration_tests.tcp_proxy import TcpProxy
from integration_tests.telemetry_checks import Ledger
from integration_tests.telemetry_pair import TIMES, WatchedPair, at_once, telemetry_folder, watched_pair
from sage_kv_connector.config import SECRET_ENV
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.launch.process import ServerError, core_halves
from sage_kv_connector.launch.sglang import (
    DECODE,
    PREFILL,
    SglangOptions,
    SglangProcess,
    build_model,
    generate,
    room_at,
    sglang_server,
)
from sage_kv_connector.launch.tiny_model import SHAPES
from sage_kv_connector.telemetry.recording.publishing import DIRECTORY_ENV

PAGE_TOKENS = 16
#: A row of SGLang 0.5.23's metadata buffers: seven of 64 bytes, one of 128, the top log-probabilities and their ids.
ROW_BYTES = 7 * 64 + 128 + 2 * 4 * 128
#: Of the bytes of a long prompt, when a link breaks.
MIDDLE, LONG = 1_000_000, 1024


class SglangLoad:
    """Requests are sent to both servers at once, as SGLang's router does. ``token_bytes``: of a token's KV."""

    def __init__(self, pair: WatchedPair, bootstrap_port: int, token_bytes: int) -> None:
        self.pair = pair
        self._token_bytes = token_bytes
        self._bootstrap_port = bootstrap_port
        self.faults = FAULTS

    def mixed(self) -> Ledger:
        """Short and long prompts, with streams and without, some again and again."""
        ledger = Ledger()
        fresh = [new_prompt(tokens) for tokens in (80, 96, 129, 200, 331, 500, 900)]
        hot, early, first = new_prompt(700), new_prompt(350), new_prompt(64)
        self.handed_over(first)  # its time is that of all that is loaded now
        at_once(
            *(lambda p=prompt: self.handed_over(p, stream=len(p) % 2 == 0) for prompt in fresh),
            lambda: self.handed_over(hot),
            lambda: self.leaves_early(early),
        )
        for prompt in (first, *fresh, hot, early):
            self.expect(ledger, len(prompt))
        tails = [hot + new_prompt(tokens) for tokens in (90, 400)]
        at_once(lambda: self.handed_over(hot), *(lambda p=prompt: self.handed_over(p) for prompt in tails))
        for prompt in (hot, *tails):
            self.expect(ledger, len(prompt), cached=len(hot))
        return ledger

    def expect(self, ledger: Ledger, tokens: int, cached: int = 0) -> None:
        """Of a prompt's whole pages those that decode's prefix cache lacks, and a row."""
        pages = -(-tokens // PAGE_TOKENS) - cached // PAGE_TOKENS
        ledger.moved(pages * PAGE_TOKENS * self._token_bytes + ROW_BYTES, transfers=2)

    # -- requests

    def room(self) -> dict[str, Any]:
        return room_at(self._bootstrap_port)

    @contextmanager
    def prefilling(self, prompt: list[int], room: dict[str, Any]) -> Iterator[None]:
        """What prefill itself answers says nothing that decode does not."""

        def prefill() -> None:
            with suppress(ServerError):
                generate(self.pair.prefill.url, prompt, max_tokens=8, bootstrap=room, timeout_s=60)

        with ThreadPoolExecutor(1) as pool:
            pool.submit(prefill)
            yield

    def decoded(self, prompt: list[int], room: dict[str, Any], *, stream: bool = True) -> None:
        generate(self.pair.decode.url, prompt, max_tokens=8, bootstrap=room, stream=stream, timeout_s=60)

    def handed_over(self, prompt: list[int], *, stream: bool = True) -> None:
        room = self.room()
        with self.prefilling(prompt, room):
            self.decoded(prompt, room, stream=stream)

    def refused(self, prompt: list[int], room: dict[str, Any]) -> None:
        """Decode can't compute a prompt: it says why."""
        try:
            self.decoded(prompt, room)
        except ServerError:
            return
        raise ServerError("decode answered a request whose KV can't have come")

    def leaves_early(self, prompt: list[int], *, waits_for: Callable[[], bool] | None = None) -> None:
        """Its client hangs up after the first token, or after ``waits_for``."""
        room = self.room()
        with self.prefilling(prompt, room):
            sampling = {"temperature": 0, "max_new_tokens": 64, "ignore_eos": True}
            body = {"input_ids": prompt, "sampling_params": sampling, "stream": True, **room}
            self.pair.decode_is_left("/generate", body, waits_for)


# -- faults: what each must be counted as, on both sides


def failed_transfer(ledger: Ledger, role: str, code: str) -> None:
    """One of a hand-over's two; the other one is given up then."""
    ledger.failed(role, "transfers_total", side=role, code=code)
    ledger.failed(role, "transfers_total", side=role, code="cancelled")


def given_up(ledger: Ledger) -> None:
    """Of what prefill sends: the pages that are under way, and the row before it is on offer."""
    ledger.failed("prefill", "transfers_total", side="prefill", code="cancelled")
    ledger.failed("prefill", "transfers_total", side="prefill", code="declined")


def lease_ended(load: SglangLoad, ledger: Ledger) -> None:
    """Nobody asks decode."""
    with load.prefilling(new_prompt(500), load.room()):
        pass
    ledger.failed("prefill", "failed_offers_total", code="expired")
    ledger.failed("prefill", "transfers_total", 2, side="prefill", code="expired")


def no_prefill(load: SglangLoad, ledger: Ledger) -> None:
    """Nobody asks prefill."""
    load.refused(new_prompt(300), load.room())
    ledger.failed("decode", "failed_loads_total", code="unknown_transfer")
    ledger.failed("decode", "transfers_total", side="decode", code="unknown_transfer")
    # The row's time ends with the pages': it is refused as they were, or given up before.
    codes = ("unknown_transfer", "cancelled")
    first, second = (named("transfers_total", side="decode", code=code) for code in codes)
    ledger.either["decode"].append((first, second))


def other_weights(load: SglangLoad, ledger: Ledger) -> None:
    prompt, room = new_prompt(300), load.room()
    say_version(load.pair.prefill, "7")
    with load.prefilling(prompt, room):
        load.refused(prompt, room)
    say_version(load.pair.prefill, "default")
    ledger.failed("decode", "failed_loads_total", code="weights")
    ledger.failed("decode", "transfers_total", 2, side="decode", code="weights")
    ledger.failed("prefill", "failed_offers_total", code="declined")
    ledger.failed("prefill", "transfers_total", 2, side="prefill", code="declined")


def another_secret(load: SglangLoad, ledger: Ledger) -> None:
    load.pair.dialled_by_a_stranger(ledger)


def cut(load: SglangLoad, ledger: Ledger) -> None:
    """The connection breaks in the middle of a transfer."""
    prompt, room, proxy = new_prompt(LONG), load.room(), load.pair.proxy
    load.pair.hold_at(MIDDLE)
    with ThreadPoolExecutor(1) as pool, load.prefilling(prompt, room):
        answer = pool.submit(load.refused, prompt, room)
        assert load.pair.is_held(), "the transfer had ended before it was cut"
        proxy.cut()
        answer.result()
    ledger.failed("decode", "failed_loads_total", code="session_lost")
    ledger.failed("decode", "retries_total", why="session_lost")  # of the row, until the pages' loss ends it
    failed_transfer(ledger, "decode", "session_lost")
    # The row was not on offer yet, and counts as one that decode does not want any more.
    ledger.failed("prefill", "failed_offers_total", code="declined")
    ledger.failed("prefill", "transfers_total", side="prefill", code="session_lost")
    ledger.failed("prefill", "transfers_total", side="prefill", code="declined")


def flipped(load: SglangLoad, ledger: Ledger) -> None:
    """A byte changes on the way."""
    prompt, room = new_prompt(LONG), load.room()
    with load.pair.flipping(MIDDLE), load.prefilling(prompt, room):
        load.refused(prompt, room)
    ledger.failed("decode", "failed_loads_total", code="checksum")
    failed_transfer(ledger, "decode", "checksum")
    ledger.failed("decode", "checksum_failures_total")
    given_up(ledger)


def aborted(load: SglangLoad, ledger: Ledger) -> None:
    """The client hangs up while its KV is under way."""
    proxy = load.pair.proxy
    load.pair.hold_at(MIDDLE)
    load.leaves_early(new_prompt(LONG), waits_for=load.pair.is_held)
    time.sleep(2.0)
    proxy.let_go()
    ledger.failed("decode", "aborted_loads_total")
    ledger.failed("decode", "transfers_total", 2, side="decode", code="cancelled")
    given_up(ledger)


FAULTS: dict[str, Callable[[SglangLoad, Ledger], None]] = {
    "lease": lease_ended,
    "no prefill": no_prefill,
    "weights": other_weights,
    "secret": another_secret,
    "cut": cut,
    "flipped": flipped,
    "aborted": aborted,
}


def settle() -> None:
    """SGLang's ranks tell by themselves."""
    time.sleep(0.5)


@contextmanager
def sglang_load(scratch: Path) -> Iterator[SglangLoad]:
    """Servers of the model of benchmarks, each on its half of the cores."""
    port = free_port()
    proxy = TcpProxy(port)
    first, second = core_halves()
    with telemetry_folder() as folder:
        env = {SECRET_ENV: secrets.token_urlsafe(16), DIRECTORY_ENV: str(folder)}
        extra = (
            "--dtype",
            "bfloat16",
            "--page-size",
            str(PAGE_TOKENS),
            "--chunked-prefill-size",
            "512",
            "--enable-metrics",
        )
        options = SglangOptions(build_model(scratch, "bench"), scratch, 4096, 16384, extra, env)
        # So that what a CRC is for is seen.
        common: dict[str, object] = {"security": "none", **TIMES}
        there = {**common, "port": port, "advertise_port": proxy.port}
        prefill = sglang_server("sglang-prefill", options, PREFILL, first, transport=there)
        decode: SglangProcess = sglang_server(
            "sglang-decode", options, DECODE, second, transport={**common, "backend": "tcp"},
            extra=("--disaggregation-decode-enable-radix-cache",),
        )  # fmt: skip

        try:
            with watched_pair(prefill, decode, proxy, folder, settle, "none") as pair:
                yield SglangLoad(pair, prefill.bootstrap_port, SHAPES["bench"].kv_bytes_per_token)
        finally:
            proxy.close()
