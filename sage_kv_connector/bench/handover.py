# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench handover``: decode's time to first token after prefill answered, ours and the peers'.

All pairs of servers stay up and take turns; those not measured are stopped. Prefill
attention is stubbed on all of them alike (baselines/README.md) unless ``real_attention``;
decode's is always real.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from sage_kv_connector.bench.server_pairs import (
    ServerPair,
    random_prompt,
    servers_env,
    start_pairs,
    with_baselines,
)
from sage_kv_connector.console import progress
from sage_kv_connector.contract.prompt import Prompt
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.launch.process import ServerError
from sage_kv_connector.launch.tiny_model import SHAPES
from sage_kv_connector.launch.vllm import complete

OURS = "ours"
PEERS = ("nixl", "mooncake")
LEVELS = ("authenticated", "encrypted")


def protected(level: str) -> str:
    """The name of ours with this security."""
    return OURS if level == "none" else f"{OURS}, {level}"


def bench_handover(
    against: Sequence[str],
    tokens: Sequence[int],
    repeats: int,
    backend: str,
    *,
    target_dtype: str = "auto",
    real_attention: bool = False,
    security: Sequence[str] = (),
) -> dict[str, Any]:
    """Run it. Ours is not protected; for each of ``security`` there is one more that is.

    A peer whose servers do not start, or fail a request, is in ``missing``. Raises ServerError for ours.
    """
    with_baselines()
    with tempfile.TemporaryDirectory(prefix="sage-kvt-bench-") as name, ExitStack() as stack:
        ours = {
            protected(level): f"backend={backend},host=127.0.0.1,target_dtype={target_dtype},security={level}"
            for level in ("none", *security)
        }
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


def handover_rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The result as a table for people."""
    yield "prefill attention", result["prefill_attention"]
    for tokens, figures in result["tokens"].items():
        for name, figure in figures["decode_ttft_s"].items():
            text = f"{figure * 1e3:.0f} ms"
            if name in figures["to_best_peer"]:
                text += f", {figures['to_best_peer'][name]:.2f} of the best peer"
            if name in figures["to_plain"]:
                text += f", {figures['to_plain'][name]:.2f} × plain"
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
    options_of_ours: Mapping[str, str],
    stack: ExitStack,
    missing: dict[str, str],
    *,
    real_attention: bool,
) -> list[ServerPair]:
    """``missing``: takes the reason of each peer whose servers do not start."""
    from baselines.sides import PeerPair, ServerSide
    from baselines.vllm_mooncake import mooncake
    from baselines.vllm_nixl import nixl

    wanted = {}
    for name, options in options_of_ours.items():
        bootstrap, common = free_port(), f"sage_kvt:{options}"
        wanted[name] = PeerPair(
            ServerSide(f"{common},bootstrap_port={bootstrap}"), ServerSide(common), bootstrap
        )
    if "nixl" in against:
        transport = "cma" if "backend=shm" in options_of_ours[OURS] else "tcp"
        wanted["nixl"] = nixl(transport, (free_port(), free_port()))
    if "mooncake" in against:
        wanted["mooncake"] = mooncake(free_port())
    env = servers_env(real_attention=real_attention)
    return start_pairs(wanted, tuple(options_of_ours), most_tokens, env, directory, stack, missing)


def _round(pairs: Sequence[ServerPair], tokens: int, what: str) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        if not pair.failed:
            with pair.turn():
                out |= _turn(pair, tokens)
    progress.print(what + ": " + ", ".join(f"{name} {r['ttft_s'] * 1e3:.0f} ms" for name, r in out.items()))
    return out


def _turn(pair: ServerPair, tokens: int) -> dict[str, dict[str, Any]]:
    """Each way of one pair, by its name."""
    out: dict[str, dict[str, Any]] = {}
    ways = {pair.name: pair.sequential}
    if pair.name == OURS:
        ways["ours, concurrent"] = pair.concurrent
    for name, hand_over in ways.items():
        prompt = random_prompt(tokens)
        try:
            out[name] = hand_over(prompt)
            out[name]["equal"] = out[name]["token_ids"] == pair.alone(prompt)
        except (
            ServerError,
            OSError,
            LookupError,
            ValueError,
        ) as error:  # a peer's bootstrap may answer anything
            if pair.name.startswith(OURS):
                raise
            pair.give_up(error)
    if pair.name == OURS:
        # These steps also bring the counters of the hand-overs to /metrics.
        recomputed = complete(pair.decode.url, random_prompt(tokens), max_tokens=2)
        out[OURS]["converted_s"] = pair.converted_s()
        out[OURS]["binding_s"] = _binding_s(random_prompt(tokens))
        out["recompute"] = {"ttft_s": recomputed.ttft_s, "prefill_s": 0.0, "equal": True}
    return out


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
        "to_plain": {
            name: median(r[name]["ttft_s"] / r[OURS]["ttft_s"] for r in rounds)
            for name in map(protected, LEVELS)
            if name in names
        },
        "token_ids_equal": {name: all(r["equal"] for r in done[name]) for name in names},
        "failed_requests": {name: len(rounds) - len(done[name]) for name in names},
    }
