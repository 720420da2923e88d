# SPDX-License-Identifier: Apache-2.0
"""A load on vLLM's servers whose KV is counted as it is sent, and faults whose codes are known."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from integration_tests.cluster import PREFILL_PARAMS, new_prompt
from integration_tests.request_pair import Pair
from integration_tests.tcp_proxy import TcpProxy
from integration_tests.telemetry_checks import Ledger
from integration_tests.telemetry_pair import (
    TIMES,
    WatchedPair,
    at_once,
    stranger,
    telemetry_folder,
    watched_pair,
)
from sage_kv_connector.config import SECRET_ENV
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.launch.process import core_halves
from sage_kv_connector.launch.tiny_model import SHAPES, build
from sage_kv_connector.launch.vllm import VllmOptions, complete, vllm_server
from sage_kv_connector.telemetry.recording.publishing import DIRECTORY_ENV

PAGE_TOKENS = 128
#: fp32 has twice the bytes of bf16.
TOKEN_BYTES = 2 * SHAPES["small"].kv_bytes_per_token
#: Of the bytes of a long prompt, when a link breaks.
MIDDLE = 1_000_000
#: Tokens of a prompt whose bytes are more than the kernel's buffers take: prefill would think they arrived.
LONG = 3000


class VllmLoad:
    """``bootstrap``: the address of prefill's bootstrap server; ``long``: tokens of a long prompt."""

    def __init__(self, pair: WatchedPair, bootstrap: str, long: int = LONG) -> None:
        self.pair = pair
        self.bootstrap = bootstrap
        self.long = long
        self.faults = FAULTS

    def mixed(self) -> Ledger:
        """Short and long prompts, with streams and without, in both orders of dispatch, some again and again."""
        ledger = Ledger()
        lengths = [16, 100, 128, 200, 300, 431, 800, 1500, 2600]
        fresh = [new_prompt(tokens) for tokens in lengths]
        beside = [new_prompt(tokens) for tokens in (250, 640, 1900)]
        hot = new_prompt(700)
        at_once(
            *(lambda p=prompt: self.handed_over(p, stream=len(p) % 2 == 0) for prompt in fresh),
            *(lambda p=prompt: self.both_at_once(p) for prompt in beside),
            lambda: self.handed_over(hot),
            lambda: self.leaves_early(new_prompt(350)),
        )
        for prompt in (*fresh, *beside, hot):
            self.expect(ledger, len(prompt))
        self.expect(ledger, 350)
        tails = [hot + new_prompt(tokens) for tokens in (90, 400)]
        at_once(lambda: self.handed_over(hot), *(lambda p=prompt: self.handed_over(p) for prompt in tails))
        for prompt in (hot, *tails):
            self.expect(ledger, len(prompt), cached=len(hot) - 1)
        return ledger

    def expect(self, ledger: Ledger, tokens: int, cached: int = 0) -> None:
        """Of a prompt's whole pages those that decode's prefix cache lacks."""
        pages = -(-tokens // PAGE_TOKENS) - cached // PAGE_TOKENS
        ledger.moved(pages * PAGE_TOKENS * TOKEN_BYTES)

    # -- requests

    def prefilled(self, prompt: list[int]) -> dict[str, Any]:
        first = complete(
            self.pair.prefill.url, prompt, max_tokens=1, kv_transfer_params=PREFILL_PARAMS, stream=False
        )
        assert first.kv_transfer_params is not None
        return first.kv_transfer_params

    def decoded(self, prompt: list[int], params: dict[str, Any], *, stream: bool = True) -> None:
        complete(
            self.pair.decode.url, prompt, max_tokens=8, kv_transfer_params=params, stream=stream, timeout_s=60
        )

    def handed_over(self, prompt: list[int], *, stream: bool = True) -> None:
        self.decoded(prompt, self.prefilled(prompt), stream=stream)

    def both_at_once(self, prompt: list[int]) -> None:
        on_prefill, on_decode = self.both()
        with ThreadPoolExecutor(1) as pool:
            beside = pool.submit(
                complete,
                self.pair.prefill.url, prompt, max_tokens=1, kv_transfer_params=on_prefill, stream=False,
            )  # fmt: skip
            self.decoded(prompt, on_decode)
            beside.result()

    def both(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return Pair(self.pair.prefill, self.pair.decode, self.pair.decode, self.bootstrap).both()

    def leaves_early(self, prompt: list[int], *, waits_for: Callable[[], bool] | None = None) -> None:
        """Its client hangs up after the first token, or after ``waits_for``."""
        body = {
            "model": "model", "prompt": prompt, "max_tokens": 64, "stream": True, "temperature": 0,
            "ignore_eos": True, "kv_transfer_params": self.prefilled(prompt),
        }  # fmt: skip
        self.pair.decode_is_left("/v1/completions", body, waits_for)


# -- faults: what each must be counted as, on both sides


def recomputed(ledger: Ledger, code: str, tokens: int, *, asked: bool = True) -> None:
    """Decode computes the prompt. ``asked``: there was somebody whom it asked for a transfer."""
    ledger.failed("decode", "failed_loads_total", code=code)
    ledger.failed("decode", "recomputed_tokens_total", tokens, code=code)
    if asked:
        ledger.failed("decode", "transfers_total", side="decode", code=code)


def not_fetched(ledger: Ledger, code: str) -> None:
    ledger.failed("prefill", "failed_offers_total", code=code)
    ledger.failed("prefill", "transfers_total", side="prefill", code=code)


def lease_ended(load: VllmLoad, ledger: Ledger) -> None:
    prompt = new_prompt(600)
    params = load.prefilled(prompt)
    time.sleep(TIMES["lease_s"] + 1.5)
    load.decoded(prompt, params)
    not_fetched(ledger, "expired")
    recomputed(ledger, "unknown_transfer", len(prompt))


def another_prompt(load: VllmLoad, ledger: Ledger) -> None:
    params, prompt = load.prefilled(new_prompt(600)), new_prompt(600)
    load.decoded(prompt, params)
    recomputed(ledger, "prompt", len(prompt))
    not_fetched(ledger, "expired")


def too_many_tokens(load: VllmLoad, ledger: Ledger) -> None:
    prompt = new_prompt(900)
    load.decoded(prompt, load.prefilled(prompt[:300]) | {"remote_prompt": None})
    recomputed(ledger, "tokens", len(prompt))
    not_fetched(ledger, "expired")


def unreachable(load: VllmLoad, ledger: Ledger) -> None:
    prompt = new_prompt(300)
    params = load.prefilled(prompt)
    nobody = {"remote_ranks": {"0": [f"tcp://127.0.0.1:{free_port()}"]}, "remote_engine_id": "nobody"}
    load.decoded(prompt, params | nobody)
    recomputed(ledger, "unreachable", len(prompt))
    ledger.failed("decode", "dials_total", code="unreachable")
    not_fetched(ledger, "expired")


def another_secret(load: VllmLoad, ledger: Ledger) -> None:
    """Prefill's place is taken by an engine with another one, which then asks prefill itself."""
    prompt = new_prompt(300)
    params = load.prefilled(prompt)
    with stranger(load.pair.security) as core:
        there = {"remote_ranks": {"0": list(core.addresses)}, "remote_engine_id": core.engine_id}
        load.decoded(prompt, params | there)
    recomputed(ledger, "bad_secret", len(prompt))
    ledger.failed("decode", "dials_total", code="bad_secret")
    ledger.failed("decode", "refused_peers_total", code="bad_secret")  # it does not let in whom it dialled
    not_fetched(ledger, "expired")
    load.pair.dialled_by_a_stranger(ledger)


def no_bootstrap(load: VllmLoad, ledger: Ledger) -> None:
    """Decode is told of a bootstrap server that is not there; prefill is never asked."""
    prompt = new_prompt(300)
    _, params = load.both()
    load.decoded(prompt, params | {"remote_bootstrap_addr": f"http://127.0.0.1:{free_port()}"})
    recomputed(ledger, "bootstrap", len(prompt), asked=False)


def cut(load: VllmLoad, ledger: Ledger) -> None:
    """The connection breaks in the middle of a transfer."""
    prompt = new_prompt(load.long)
    params = load.prefilled(prompt)
    proxy = load.pair.proxy
    load.pair.hold_at(MIDDLE)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(load.decoded, prompt, params)
        assert load.pair.is_held(), "the transfer had ended before it was cut"
        proxy.cut()
        answer.result()
    recomputed(ledger, "session_lost", len(prompt))
    not_fetched(ledger, "session_lost")


def flipped(load: VllmLoad, ledger: Ledger) -> None:
    """A byte changes on the way."""
    prompt = new_prompt(load.long)
    params = load.prefilled(prompt)
    with load.pair.flipping(MIDDLE):
        load.decoded(prompt, params)
    if load.pair.security == "none":
        recomputed(ledger, "checksum", len(prompt))
        ledger.failed("decode", "checksum_failures_total")
        ledger.failed("prefill", "transfers_total", side="prefill", code="cancelled")
    else:  # a wrong tag ends the session
        recomputed(ledger, "forged", len(prompt))
        ledger.failed("decode", "forged_frames_total")
        not_fetched(ledger, "session_lost")


def cut_early(load: VllmLoad, ledger: Ledger) -> None:
    """The connection breaks before the first byte: it is asked for again over another one."""
    opens, prompt = new_prompt(64), new_prompt(load.long)
    load.handed_over(opens)
    params = load.prefilled(prompt)
    proxy = load.pair.proxy
    load.pair.hold_at(0)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(load.decoded, prompt, params)
        assert load.pair.is_held(), "nothing was to be cut"
        proxy.cut()
        answer.result()
    ledger.failed("decode", "retries_total", why="session_lost")
    for moved in (opens, prompt):
        load.expect(ledger, len(moved))


def aborted(load: VllmLoad, ledger: Ledger) -> None:
    """The client hangs up while its KV is under way."""
    proxy = load.pair.proxy
    load.pair.hold_at(MIDDLE)
    load.leaves_early(new_prompt(load.long), waits_for=load.pair.is_held)
    time.sleep(1.0)
    proxy.let_go()
    ledger.failed("decode", "aborted_loads_total")
    ledger.failed("decode", "transfers_total", side="decode", code="cancelled")
    ledger.failed("prefill", "transfers_total", side="prefill", code="cancelled")


FAULTS: dict[str, Callable[[VllmLoad, Ledger], None]] = {
    "lease": lease_ended,
    "prompt": another_prompt,
    "tokens": too_many_tokens,
    "unreachable": unreachable,
    "secret": another_secret,
    "bootstrap": no_bootstrap,
    "cut": cut,
    "cut early": cut_early,
    "flipped": flipped,
    "aborted": aborted,
}


@contextmanager
def vllm_load(scratch: Path, *extra: str, long: int = LONG, **options: Any) -> Iterator[VllmLoad]:
    """Servers of the small model. ``extra``: arguments of both; ``options``: of both transports."""
    first, second = core_halves()
    port, bootstrap = free_port(), free_port()
    proxy = TcpProxy(port)
    with telemetry_folder() as folder:
        env = {
            SECRET_ENV: secrets.token_urlsafe(16),
            DIRECTORY_ENV: str(folder),
        }
        given = VllmOptions(
            build(scratch, "small"), scratch, long + 1024, block_size=PAGE_TOKENS,
            extra=("--dtype", "float32", *extra), env=env,
        )  # fmt: skip
        # So that what a CRC is for is seen.
        common = {"host": "127.0.0.1", "security": "none", **TIMES, **options}
        words = ",".join(f"{key}={value}" for key, value in common.items())
        there = f"port={port},advertise_port={proxy.port},bootstrap_port={bootstrap}"
        prefill = vllm_server("prefill", given, f"sage_kvt:{words},{there}", first)
        decode = vllm_server("decode", given, f"sage_kvt:{words},backend=tcp", second)

        def settle() -> None:
            """vLLM tells with a step only, and each API server what it was told."""
            for _ in range(2):
                for server in (prefill, decode):
                    complete(server.url, new_prompt(16), max_tokens=2)
                time.sleep(0.3)

        try:
            with watched_pair(prefill, decode, proxy, folder, settle, common["security"]) as pair:
                yield VllmLoad(pair, f"http://127.0.0.1:{bootstrap}", long)
        finally:
            proxy.close()
