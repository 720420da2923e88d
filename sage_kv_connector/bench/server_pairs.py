# SPDX-License-Identifier: Apache-2.0
"""Pairs of vLLM servers that take turns in a comparison: all stay up, those not measured are stopped."""

from __future__ import annotations

import os
import random
import secrets
import signal
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sage_kv_connector.bench.peer_libraries import missing_libraries, what_to_install
from sage_kv_connector.config import SECRET_ENV
from sage_kv_connector.console import progress
from sage_kv_connector.launch.process import Process, ServerError, core_halves, running
from sage_kv_connector.launch.tiny_model import build
from sage_kv_connector.launch.vllm import PREFILL_PARAMS, VllmOptions, complete, gauge, vllm_server

if TYPE_CHECKING:
    from baselines.vllm_peers import PeerPair

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

    def sequential(self, prompt: list[int]) -> dict[str, Any]:
        """Prefill, then decode, as a sequential router does it."""
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
        answer = complete(self.decode.url, prompt, max_tokens=2, kv_transfer_params=decode_params)
        return {"ttft_s": answer.ttft_s, "prefill_s": first.total_s, "token_ids": answer.token_ids}

    def concurrent(self, prompt: list[int]) -> dict[str, Any]:
        """Both at once; the time counts from prefill's answer."""
        prefill_params, decode_params = self._bootstrap()
        answered: list[float] = []

        def prefill() -> None:
            complete(self.prefill.url, prompt, max_tokens=1, kv_transfer_params=prefill_params, stream=False)
            answered.append(time.perf_counter())

        thread = threading.Thread(target=prefill)
        begun = time.perf_counter()
        thread.start()
        answer = complete(self.decode.url, prompt, max_tokens=2, kv_transfer_params=decode_params)
        thread.join()
        return {
            "ttft_s": begun + answer.ttft_s - answered[0],
            "prefill_s": answered[0] - begun,
            "token_ids": answer.token_ids,
        }

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
        from baselines.vllm_peers import bootstrap_params

        assert self.bootstrap_port is not None
        return bootstrap_params(self.bootstrap_port, f"xfer-{secrets.token_hex(16)}")


def servers_env(*, real_attention: bool = False) -> dict[str, str]:
    """What all servers of a comparison have in common."""
    from baselines.vllm_peers import PLUGINS

    return {
        SECRET_ENV: secrets.token_urlsafe(16),
        "PYTHONPATH": os.pathsep.join([str(PLUGINS), os.environ.get("PYTHONPATH", "")]),
        "SAGE_KVT_PREFILL_STUB": "0" if real_attention else "1",
    }


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
    model = build(directory, "bench")
    pairs = []
    for name, sides in wanted.items():
        servers = []
        both = ("prefill", sides.prefill), ("decode", sides.decode)
        for (role, side), core in zip(both, core_halves(), strict=True):
            options = VllmOptions(model, directory, most_tokens + 128, env={**env, **side.env})
            servers.append(vllm_server(f"{name} {role}", options, side.kv_transfer_config, core))
        pair = ServerPair(name, servers[0], servers[1], sides.bootstrap_port)
        stack.callback(pair.signal, signal.SIGCONT)
        try:
            stack.enter_context(running(*servers))
        except ServerError as error:
            if name in ours:
                raise
            lacking = what_to_install(missing_libraries(name.split()[0].lower()))
            missing[name] = f"{lacking}: {error}" if lacking else str(error)
            progress.print(f"{name} is left out: {missing[name]}", markup=False)
            continue
        stack.callback(pair.signal, signal.SIGCONT)
        pair.signal(signal.SIGSTOP)
        pairs.append(pair)
    return pairs


def random_prompt(tokens: int) -> list[int]:
    """One token more than whole pages: that one is computed with real attention wherever the rest is cached."""
    return [random.randint(1, 255) for _ in range(tokens + 1)]
