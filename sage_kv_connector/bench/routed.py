# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench routed``: time to the first token through vLLM's own router, ours beside NIXL's pull and push.

Each contender is a pair of servers with an unmodified router in front, in its mode ``nixl``. "Ours" is asked at both
servers at once from the second request on, as NIXL's push mode is; "ours, prefill first" is the same with
``concurrent=false``. Pairs take turns; those not measured are stopped. Prefill attention is stubbed on all alike.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from sage_kv_connector.bench.server_pairs import (
    ServerPair,
    random_prompt,
    servers_env,
    start_pairs,
    with_baselines,
)
from sage_kv_connector.console import progress
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.launch.process import Process, ServerError, running
from sage_kv_connector.launch.vllm import complete, metric, router

OURS, FIRST = "ours", "ours, prefill first"
PEERS = ("NIXL pull", "NIXL push")


class _Routed(NamedTuple):
    pair: ServerPair
    front: Process


def bench_routed(tokens: Sequence[int], repeats: int, backend: str, *, peers: bool) -> dict[str, Any]:
    """``rows``: by tokens and contender, seconds to the first token and of it after prefill's own work.

    A peer that can't run is in ``missing`` with the reason. Raises ServerError where ours fails.
    """
    with_baselines()
    missing: dict[str, str] = {}
    rows = []
    with tempfile.TemporaryDirectory(prefix="sage-kvt-bench-") as name, ExitStack() as stack:
        contenders = _start(Path(name), max(tokens), backend, stack, missing, peers=peers)
        for count in tokens:
            rounds = [_round(contenders, count) for _ in range(repeats + 1)]
            rows += _rows(count, rounds[1:])  # the first warms up
            progress.print(
                f"{count} tokens: " + ", ".join(_text(row) for row in rows if row["tokens"] == count)
            )
        missing |= {pair.name: pair.failed for pair, _ in contenders if pair.failed}
    return {"backend": backend, "repeats": repeats, "prefill_attention": "stubbed on all servers", "rows": rows,
            "missing": missing}  # fmt: skip


def _start(
    directory: Path, most: int, backend: str, stack: ExitStack, missing: dict[str, str], *, peers: bool
) -> list[_Routed]:
    from baselines.sides import PeerPair, ServerSide
    from baselines.vllm_nixl import PULL, PUSH, nixl

    common = f"sage_kvt:backend={backend},host=127.0.0.1"
    transport = "cma" if backend == "shm" else "tcp"
    wanted = {
        OURS: PeerPair(ServerSide(common), ServerSide(common)),
        FIRST: PeerPair(ServerSide(f"{common},concurrent=false"), ServerSide(f"{common},concurrent=false")),
    }
    if peers:
        for name, kind in zip(PEERS, (PULL, PUSH), strict=True):
            wanted[name] = nixl(transport, (free_port(), free_port()), kind)
    contenders = []
    for pair in start_pairs(wanted, (OURS, FIRST), most, servers_env(), directory, stack, missing):
        folder = directory / pair.name
        folder.mkdir()
        front = router(pair.prefill, pair.decode, folder)
        with pair.turn():
            stack.enter_context(running(front))
        contenders.append(_Routed(pair, front))
    return contenders


def _round(contenders: Sequence[_Routed], tokens: int) -> dict[str, dict[str, Any]]:
    out = {}
    for pair, front in contenders:
        if pair.failed:
            continue
        with pair.turn():
            prompt = random_prompt(tokens)
            try:
                before = _prefill_s(pair.prefill)
                answer = complete(front.url, prompt, max_tokens=2)
                after_prefill_s = answer.ttft_s - (_prefill_s(pair.prefill) - before)
                right = answer.token_ids == pair.alone(prompt)
                out[pair.name] = {"ttft_s": answer.ttft_s, "after_prefill_s": after_prefill_s, "right": right}
            except (ServerError, OSError) as error:
                if pair.name not in PEERS:
                    raise
                pair.give_up(error)
    return out


def _prefill_s(server: Process) -> float:
    """Seconds that this server's requests took so far, by its own metrics."""
    return metric(server, "vllm:e2e_request_latency_seconds_sum")


def _rows(tokens: int, rounds: list[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    rows = []
    for name in dict.fromkeys(name for r in rounds for name in r):
        done = [r[name] for r in rounds if name in r]
        rows.append(
            {
                "tokens": tokens,
                "contender": name,
                **{key: median(one[key] for one in done) for key in ("ttft_s", "after_prefill_s")},
                "right": all(one["right"] for one in done),
                "to_first": _ratio(name, (FIRST,), rounds),
                "to_best_peer": _ratio(name, PEERS, rounds),
            }
        )
    return rows


def _ratio(name: str, others: Sequence[str], rounds: list[dict[str, dict[str, Any]]]) -> float | None:
    """Of the time after prefill's work to that of the best of ``others`` in the same round; of ours at once only."""
    ratios = [
        r[name]["after_prefill_s"] / min(r[other]["after_prefill_s"] for other in others if other in r)
        for r in rounds
        if name == OURS and name in r and any(other in r for other in others)
    ]
    return median(ratios) if ratios else None


def _text(row: dict[str, Any]) -> str:
    text = (
        f"{row['contender']} {row['ttft_s'] * 1e3:.0f} ms, {row['after_prefill_s'] * 1e3:.0f} after prefill"
    )
    if row["to_best_peer"] is not None:
        text += f" ({row['to_best_peer']:.2f} of the best peer)"
    if row["to_first"] is not None:
        text += f" ({row['to_first']:.2f} of prefill first)"
    return text + ("" if row["right"] else ", WRONG TOKEN IDS")


def routed_rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The result as a table for people."""
    yield "prefill attention", result["prefill_attention"]
    for row in result["rows"]:
        yield f"{row['tokens']} tokens", _text(row)
    for name, why in result["missing"].items():
        yield name, f"left out: {why.splitlines()[0]}"
