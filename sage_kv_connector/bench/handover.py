# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench handover``: decode's time to first token after prefill answered, ours and the peers'.

All pairs of servers stay up and take turns; those not measured are stopped. Prefill
attention is stubbed on all of them alike (baselines/README.md) unless ``real_attention``;
decode's is always real.
"""

from __future__ import annotations

import os
import random
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from sage_kv_connector.bench.contender import CHECKOUT
from sage_kv_connector.bench.peer_libraries import missing_libraries, what_to_install
from sage_kv_connector.config import SECRET_ENV
from sage_kv_connector.console import progress
from sage_kv_connector.contract.prompt import Prompt
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.launch.process import Process, ServerError, core_halves, running
from sage_kv_connector.launch.tiny_model import SHAPES, build
from sage_kv_connector.launch.vllm import PREFILL_PARAMS, VllmOptions, complete, gauge, vllm_server

#: Seconds that servers get to settle after they were stopped.
SETTLE_S = 0.3
PEERS = ("nixl", "mooncake")


class ServerPair:
    """A prefill and a decode server of one connector; runs only within ``turn``."""

    def __init__(self, name: str, prefill: Process, decode: Process, bootstrap_port: int | None) -> None:
        self.name = name
        self.prefill, self.decode = prefill, decode
        self.bootstrap_port = bootstrap_port
        #: Why a peer is left out: one that failed once may hold its pages for good, and block the next request.
        self.failed = ""

    def signal(self, number: int) -> None:
        for process in (self.prefill, self.decode):
            if process.popen is not None:
                os.killpg(process.popen.pid, number)

    def sequential(self, prompt: list[int]) -> dict[str, Any]:
        """Prefill, then decode, as a sequential router does it."""
        if self.bootstrap_port is None or self.name == "ours":
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

    def alone(self, prompt: list[int]) -> list[int]:
        """What prefill's server itself answers, from the KV in its own cache."""
        return complete(self.prefill.url, prompt, max_tokens=2).token_ids

    def converted_s(self) -> float:
        """Seconds that conversion threads of both sides have worked so far."""
        return sum(gauge(server, "conversion_ns") for server in (self.prefill, self.decode)) / 1e9

    def _bootstrap(self) -> tuple[dict[str, Any], dict[str, Any]]:
        from baselines.vllm_peers import bootstrap_params

        assert self.bootstrap_port is not None
        return bootstrap_params(self.bootstrap_port, f"xfer-{secrets.token_hex(16)}")


def bench_handover(
    against: Sequence[str],
    tokens: Sequence[int],
    repeats: int,
    backend: str,
    *,
    target_dtype: str = "auto",
    real_attention: bool = False,
) -> dict[str, Any]:
    """Run it. A peer whose servers do not start, or fail a request, is in ``missing``. Raises ServerError for ours."""
    if not (CHECKOUT / "baselines").is_dir():
        raise ServerError(
            "the peers' programs are not part of the installed package: run this from a checkout"
        )
    sys.path.insert(0, str(CHECKOUT))
    with tempfile.TemporaryDirectory(prefix="sage-kvt-bench-") as name, ExitStack() as stack:
        ours = f"backend={backend},host=127.0.0.1,target_dtype={target_dtype}"
        missing: dict[str, str] = {}
        pairs = _start(Path(name), against, max(tokens), ours, stack, missing, real_attention=real_attention)
        sizes = {}
        for count in tokens:
            rounds = [
                _round(pairs, count, f"{count} tokens, round {i} of {repeats}") for i in range(repeats + 1)
            ]
            sizes[str(count)] = _summary(rounds[1:]) | {
                "conversion": _conversion(rounds),
                "binding": _binding(rounds[1:]),
            }  # the first warms up
        missing |= {pair.name: pair.failed for pair in pairs if pair.failed}
        return {
            "backend": backend,
            "kv_bytes_per_token": SHAPES["bench"].kv_bytes_per_token,
            "target_dtype": target_dtype,
            "prefill_attention": "real" if real_attention else "stubbed on all servers",
            "repeats": repeats,
            "tokens": sizes,
            "missing": missing,
        }


def servers_env(*, real_attention: bool = False) -> dict[str, str]:
    """What all servers of a comparison have in common."""
    from baselines.vllm_peers import PLUGINS

    return {
        SECRET_ENV: secrets.token_urlsafe(16),
        "PYTHONPATH": os.pathsep.join([str(PLUGINS), os.environ.get("PYTHONPATH", "")]),
        "SAGE_KVT_PREFILL_STUB": "0" if real_attention else "1",
    }


def handover_rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The result as a table for people."""
    yield "prefill attention", result["prefill_attention"]
    for tokens, figures in result["tokens"].items():
        for name, figure in figures["decode_ttft_s"].items():
            text = f"{figure * 1e3:.0f} ms"
            if name in figures["to_best_peer"]:
                text += f", {figures['to_best_peer'][name]:.2f} of the best peer"
            if not figures["token_ids_equal"][name]:
                text += ", WRONG TOKEN IDS"
            yield f"{tokens} tokens, {name}", text
        binding = figures["binding"]
        text = (
            f"{binding['seconds'] * 1e6:.0f} µs, {binding['of_ttft']:.2%} of the time to decode's first token"
        )
        yield f"{tokens} tokens, binding to the prompt", text
        share = figures["conversion"]
        if share["thread_s"]:
            text = f"{share['thread_s'] * 1e3:.0f} ms of threads beside the engines, "
            text += f"{share['of_request']:.2%} of a request"
            yield f"{tokens} tokens, conversion", text
    for name, why in result["missing"].items():
        yield name, f"left out: {why.splitlines()[0]}"


def _start(
    directory: Path,
    against: Sequence[str],
    most_tokens: int,
    options_of_ours: str,
    stack: ExitStack,
    missing: dict[str, str],
    *,
    real_attention: bool,
) -> list[ServerPair]:
    """``missing``: takes the reason of each peer whose servers do not start."""
    from baselines.vllm_peers import PeerPair, ServerSide, mooncake, nixl

    bootstrap = free_port()
    common = f"sage_kvt:{options_of_ours}"
    wanted = {
        "ours": PeerPair(ServerSide(f"{common},bootstrap_port={bootstrap}"), ServerSide(common), bootstrap)
    }
    if "nixl" in against:
        transport = "cma" if "backend=shm" in options_of_ours else "tcp"
        wanted["nixl"] = nixl(transport, (free_port(), free_port()))
    if "mooncake" in against:
        wanted["mooncake"] = mooncake(free_port())
    model = build(directory, "bench")
    env = servers_env(real_attention=real_attention)
    cores = core_halves()
    pairs = []
    for name, sides in wanted.items():
        servers = []
        for role, side, core in (("prefill", sides.prefill, cores[0]), ("decode", sides.decode, cores[1])):
            options = VllmOptions(model, directory, most_tokens + 128, env={**env, **side.env})
            servers.append(vllm_server(f"{name}-{role}", options, side.kv_transfer_config, core))
        pair = ServerPair(name, servers[0], servers[1], sides.bootstrap_port)
        stack.callback(pair.signal, signal.SIGCONT)
        try:
            stack.enter_context(running(*servers))
        except ServerError as error:
            if name == "ours":
                raise
            lacking = what_to_install(missing_libraries(name))
            missing[name] = f"{lacking}: {error}" if lacking else str(error)
            progress.print(f"{name} is left out: {missing[name]}", markup=False)
            continue
        stack.callback(pair.signal, signal.SIGCONT)
        pair.signal(signal.SIGSTOP)
        pairs.append(pair)
    return pairs


def _round(pairs: Sequence[ServerPair], tokens: int, what: str) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        if pair.failed:
            continue
        pair.signal(signal.SIGCONT)
        time.sleep(SETTLE_S)
        ways = {pair.name: pair.sequential}
        if pair.name == "ours":
            ways["ours, concurrent"] = pair.concurrent
        for name, hand_over in ways.items():
            prompt = _prompt(tokens)
            try:
                out[name] = hand_over(prompt)
                out[name]["equal"] = out[name]["token_ids"] == pair.alone(prompt)
            except (
                ServerError,
                OSError,
                LookupError,
                ValueError,
            ) as error:  # a peer's bootstrap may answer anything
                if pair.name == "ours":
                    raise
                pair.failed = f"failed a request: {error}"
                progress.print(f"{name} is left out from here: it {pair.failed}", markup=False)
        if pair.name == "ours":
            # These steps also bring the counters of the hand-overs to /metrics.
            recomputed = complete(pair.decode.url, _prompt(tokens), max_tokens=2)
            out["ours"]["converted_s"] = pair.converted_s()
            out["ours"]["binding_s"] = _binding_s(_prompt(tokens))
            out["recompute"] = {"ttft_s": recomputed.ttft_s, "prefill_s": 0.0, "equal": True}
        pair.signal(signal.SIGSTOP)
    progress.print(what + ": " + ", ".join(f"{name} {r['ttft_s'] * 1e3:.0f} ms" for name, r in out.items()))
    return out


def _prompt(tokens: int) -> list[int]:
    """One token more than whole pages: that one is computed with real attention wherever the rest is cached."""
    return [random.randint(1, 255) for _ in range(tokens + 1)]


def _binding_s(prompt: list[int]) -> float:
    """What decode does so that a transfer belongs to this prompt; prefill does it before it computes."""
    begun = time.perf_counter()
    _ = Prompt(prompt).whole
    return time.perf_counter() - begun


def _binding(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, float]:
    """Seconds, and the share of the time to decode's first token."""
    taken = median(r["ours"]["binding_s"] for r in rounds)
    return {"seconds": taken, "of_ttft": taken / median(r["ours"]["ttft_s"] for r in rounds)}


def _conversion(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, float]:
    """Work of conversion threads for one hand-over, both sides together, and as a share of request time.

    Requests of both ways of dispatch count. The threads work beside the engine and the wire, so
    the share is what conversion costs at most.
    """
    done = [r["ours"]["converted_s"] for r in rounds]
    handed = [r[name] for r in rounds[1:] for name in ("ours", "ours, concurrent")]
    work = done[-1] - done[0]
    return {
        "thread_s": work / len(handed),
        "of_request": work / sum(one["prefill_s"] + one["ttft_s"] for one in handed),
    }


def _summary(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for r in rounds for name in r))
    done = {name: [r[name] for r in rounds if name in r] for name in names}
    ours = [name for name in names if name.startswith("ours")]
    compared = [r for r in rounds if any(peer in r for peer in PEERS)]
    return {
        "decode_ttft_s": {name: median(r["ttft_s"] for r in done[name]) for name in names},
        "prefill_s": {name: median(r["prefill_s"] for r in done[name]) for name in names},
        "to_best_peer": {
            name: median(
                r[name]["ttft_s"] / min(r[peer]["ttft_s"] for peer in PEERS if peer in r) for r in compared
            )
            for name in ours
            if compared
        },
        "token_ids_equal": {name: all(r["equal"] for r in done[name]) for name in names},
        "failed_requests": {name: len(rounds) - len(done[name]) for name in names},
    }
