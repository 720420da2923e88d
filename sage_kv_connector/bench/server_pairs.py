# SPDX-License-Identifier: Apache-2.0
"""Pairs of vLLM servers that take turns in a comparison: all stay up, those not measured are stopped."""

from __future__ import annotations

import os
import random
import secrets
import signal
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sage_kv_connector.bench.contender import CHECKOUT
from sage_kv_connector.bench.peer_libraries import missing_libraries, what_to_install
from sage_kv_connector.config import SECRET_ENV
from sage_kv_connector.console import progress
from sage_kv_connector.launch.process import Process, ServerError, core_halves, running
from sage_kv_connector.launch.tiny_model import build
from sage_kv_connector.launch.vllm import PREFILL_PARAMS, Answer, VllmOptions, complete, gauge, vllm_server

if TYPE_CHECKING:
    from baselines.sides import PeerPair

#: Seconds that servers get to settle after they were stopped.
SETTLE_S = 0.3


class ServerPair:
    """A prefill and a decode server of one connector; runs only within ``turn``."""

    def __init__(self, name: str, prefill: Process, decode: Process, bootstrap_port: int | None) -> None:
        self.name = name
        self.prefill, self.decode = prefill, decode
        self.bootstrap_port = bootstrap_port
        #: Why it is left out.
        self.failed = ""

    def signal(self, number: int) -> None:
        for process in (self.prefill, self.decode):
            if process.popen is not None:
                os.killpg(process.popen.pid, number)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Both servers run meanwhile."""
        self.signal(signal.SIGCONT)
        time.sleep(SETTLE_S)
        try:
            yield
        finally:
            self.signal(signal.SIGSTOP)

    def sequential(self, prompt: list[int], max_tokens: int = 2) -> dict[str, Any]:
        """Prefill, then decode, as a sequential router does it; see ``taken``."""
        if self.bootstrap_port is None or self.name.startswith("ours"):
            first = complete(
                self.prefill.url, prompt, max_tokens=1, kv_transfer_params=PREFILL_PARAMS, stream=False
            )
            decode_params = first.kv_transfer_params
        else:
            prefill_params, decode_params = self._bootstrap()
            first = complete(
                self.prefill.url, prompt, max_tokens=1, kv_transfer_params=prefill_params, stream=False
            )
        answer = complete(self.decode.url, prompt, max_tokens=max_tokens, kv_transfer_params=decode_params)
        return taken(first.total_s, answer.ttft_s, answer)

    def concurrent(self, prompt: list[int], max_tokens: int = 2) -> dict[str, Any]:
        """Both at once; see ``taken``."""
        prefill_params, decode_params = self._bootstrap()
        with ThreadPoolExecutor(1) as beside:
            begun = time.perf_counter()
            first = beside.submit(self._prefill, prompt, prefill_params)
            answer = complete(
                self.decode.url, prompt, max_tokens=max_tokens, kv_transfer_params=decode_params
            )
            prefill_s = first.result() - begun
        return taken(prefill_s, answer.ttft_s - prefill_s, answer)

    def _prefill(self, prompt: list[int], params: dict[str, Any]) -> float:
        """When it answered."""
        complete(self.prefill.url, prompt, max_tokens=1, kv_transfer_params=params, stream=False)
        return time.perf_counter()

    def give_up(self, error: Exception) -> None:
        """It failed a request: it may hold its pages for good, and block the next request."""
        self.failed = f"failed a request: {error}"
        progress.print(f"{self.name} is left out from here: it {self.failed}", markup=False)

    def alone(self, prompt: list[int]) -> list[int]:
        """What prefill's server itself answers, from the KV in its own cache."""
        return complete(self.prefill.url, prompt, max_tokens=2).token_ids

    def converted_s(self) -> float:
        """Seconds that conversion threads of both sides have worked so far."""
        return sum(gauge(server, "conversion_seconds") for server in (self.prefill, self.decode))

    def _bootstrap(self) -> tuple[dict[str, Any], dict[str, Any]]:
        from baselines.vllm_mooncake import bootstrap_params

        assert self.bootstrap_port is not None
        return bootstrap_params(self.bootstrap_port, f"xfer-{secrets.token_hex(16)}", self.prefill.host)


def taken(prefill_s: float, ttft_s: float, answer: Answer) -> dict[str, Any]:
    """``prefill_s``: until prefill answered; ``ttft_s``: from then to decode's first token; ``rest_s``: to the last."""
    return {
        "prefill_s": prefill_s,
        "ttft_s": ttft_s,
        "rest_s": answer.total_s - answer.ttft_s,
        "token_ids": answer.token_ids,
    }


def with_baselines(lacks: str = "the peers' programs are") -> None:
    """Makes ``baselines`` importable. Raises ServerError where the checkout does not have it."""
    if not (CHECKOUT / "baselines").is_dir():
        raise ServerError(f"{lacks} not part of the installed package: run this from a checkout")
    sys.path.insert(0, str(CHECKOUT))


def servers_env(*, real_attention: bool = False) -> dict[str, str]:
    """What all servers of a comparison have in common."""
    from baselines.sides import PLUGINS

    return {
        SECRET_ENV: secrets.token_urlsafe(16),
        "PYTHONPATH": os.pathsep.join([str(PLUGINS), os.environ.get("PYTHONPATH", "")]),
        "SAGE_KVT_PREFILL_STUB": "0" if real_attention else "1",
        "SAGE_KVT_FAST_LINEAR": "1",
    }


class Place(NamedTuple):
    """Where a server listens, and the words before its command that take it there."""

    host: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()


def pair_of(
    name: str,
    sides: PeerPair,
    options: VllmOptions,
    places: tuple[Place, Place] = (Place(), Place()),
    kind: type[ServerPair] = ServerPair,
) -> ServerPair:
    """A pair that is not started, each server on a half of the cores."""
    servers = []
    both = ("prefill", sides.prefill), ("decode", sides.decode)
    for (role, side), core, place in zip(both, core_halves(), places, strict=True):
        own = replace(options, env={**options.env, **side.env})
        servers.append(
            vllm_server(
                f"{name} {role}", own, side.kv_transfer_config, core, host=place.host, prefix=place.prefix
            )
        )
    return kind(name, servers[0], servers[1], sides.bootstrap_port)


def start_pairs(
    wanted: Mapping[str, PeerPair],
    ours: Collection[str],
    most_tokens: int,
    env: Mapping[str, str],
    directory: Path,
    stack: ExitStack,
    missing: dict[str, str],
) -> list[ServerPair]:
    """The pairs, stopped, until ``stack`` ends; each server on a half of the cores.

    ``missing`` takes the reason of each peer whose servers do not start. Raises ServerError for ``ours``.
    """
    options = VllmOptions(build(directory, "bench"), directory, most_tokens + 128, env=dict(env))
    pairs = []
    for name, sides in wanted.items():
        pair = pair_of(name, sides, options)
        stack.callback(pair.signal, signal.SIGCONT)
        try:
            stack.enter_context(running(pair.prefill, pair.decode))
        except ServerError as error:
            if name in ours:
                raise
            missing[name] = why_missing(name.split()[0].lower(), error)
            progress.print(f"{name} is left out: {missing[name]}", markup=False)
            continue
        stack.callback(pair.signal, signal.SIGCONT)
        pair.signal(signal.SIGSTOP)
        pairs.append(pair)
    return pairs


def why_missing(module: str, error: ServerError) -> str:
    """Why a peer's servers did not start: libraries that its ``module`` wants, if this machine lacks some."""
    lacking = what_to_install(missing_libraries(module))
    return f"{lacking}: {error}" if lacking else str(error)


def random_prompt(tokens: int) -> list[int]:
    """One token more than whole pages: that one is computed with real attention wherever the rest is cached."""
    return [random.randint(1, 255) for _ in range(tokens + 1)]
