# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench routed``: time to the first token through vLLM's own router, ours beside NIXL's pull and push.

Each contender is a pair of servers with an unmodified router in front, in its mode ``nixl``. "Ours" is asked at both
servers at once from the second request on, as NIXL's push mode is; "ours, prefill first" is the same with
``concurrent=false``. Pairs take turns; those not measured are stopped. Prefill attention is stubbed on all alike.
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from sage_kv_connector.bench.contender import CHECKOUT
from sage_kv_connector.bench.handover import SETTLE_S, ServerPair, servers_env
from sage_kv_connector.bench.peer_libraries import missing_libraries, what_to_install
from sage_kv_connector.console import progress
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.launch.process import Process, ServerError, core_halves, running
from sage_kv_connector.launch.tiny_model import build
from sage_kv_connector.launch.vllm import VllmOptions, complete, metric, router, vllm_server

OURS, FIRST = "ours", "ours, prefill first"
PEERS = ("NIXL pull", "NIXL push")


class _Routed(NamedTuple):
    pair: ServerPair
    front: Process


def bench_routed(tokens: Sequence[int], repeats: int, backend: str, *, peers: bool) -> dict[str, Any]:
    """``rows``: by tokens and contender, seconds to the first token and of it after prefill's own work.

    A peer that can't run is in ``missing`` with the reason. Raises ServerError where ours fails.
    """
    if not (CHECKOUT / "baselines").is_dir():
        raise ServerError(
            "the peers' programs are not part of the installed package: run this from a checkout"
        )
    sys.path.insert(0, str(CHECKOUT))
    missing: dict[str, str] = {}
    rows = []
    with tempfile.TemporaryDirectory(prefix="sage-kvt-bench-") as name, ExitStack() as stack:
        contenders = _start(Path(name), max(tokens), backend, stack, missing, peers=peers)
        for count in tokens:
            rounds = [_round(contenders, count, missing) for _ in range(repeats + 1)][
                1:
            ]  # the first warms up
            rows += _rows(count, rounds)
            progress.print(
                f"{count} tokens: " + ", ".join(_text(row) for row in rows if row["tokens"] == count)
            )
    return {"backend": backend, "repeats": repeats, "prefill_attention": "stubbed on all servers", "rows": rows,
            "missing": missing}  # fmt: skip


def _start(
    directory: Path, most: int, backend: str, stack: ExitStack, missing: dict[str, str], *, peers: bool
) -> dict[str, _Routed]:
    from baselines.vllm_peers import PeerPair, ServerSide, nixl

    common = f"sage_kvt:backend={backend},host=127.0.0.1"
    transport = "cma" if backend == "shm" else "tcp"
    wanted = {
        OURS: PeerPair(ServerSide(common), ServerSide(common)),
        FIRST: PeerPair(ServerSide(f"{common},concurrent=false"), ServerSide(f"{common},concurrent=false")),
    }
    if peers:
        for name, kind in zip(PEERS, ("NixlPullConnector", "NixlPushConnector"), strict=True):
            wanted[name] = nixl(transport, (free_port(), free_port()), kind)
    model, env, cores = build(directory, "bench"), servers_env(), core_halves()
    found = {}
    for name, sides in wanted.items():
        servers = []
        for role, side, core in (("prefill", sides.prefill, cores[0]), ("decode", sides.decode, cores[1])):
            options = VllmOptions(model, directory, most + 128, env={**env, **side.env})
            servers.append(vllm_server(f"{name} {role}", options, side.kv_transfer_config, core))
        pair = ServerPair(name, servers[0], servers[1], None)
        folder = directory / name
        folder.mkdir()
        front = router(servers[0], servers[1], folder)
        stack.callback(pair.signal, signal.SIGCONT)
        try:
            stack.enter_context(running(*servers))
            stack.enter_context(running(front))
        except ServerError as error:
            if name not in PEERS:
                raise
            lacking = what_to_install(missing_libraries("nixl"))
            missing[name] = f"{lacking}: {error}" if lacking else str(error)
            continue
        stack.callback(pair.signal, signal.SIGCONT)
        pair.signal(signal.SIGSTOP)
        found[name] = _Routed(pair, front)
    return found


def _round(contenders: dict[str, _Routed], tokens: int, missing: dict[str, str]) -> dict[str, dict[str, Any]]:
    out = {}
    for name, (pair, front) in contenders.items():
        if name in missing:
            continue
        pair.signal(signal.SIGCONT)
        time.sleep(SETTLE_S)
        prompt = [random.randint(1, 255) for _ in range(tokens + 1)]
        try:
            before = _prefill_s(pair.prefill)
            answer = complete(front.url, prompt, max_tokens=2)
            prefill_s = _prefill_s(pair.prefill) - before
            right = answer.token_ids == pair.alone(prompt)
            out[name] = {
                "ttft_s": answer.ttft_s,
                "after_prefill_s": answer.ttft_s - prefill_s,
                "right": right,
            }
        except (ServerError, OSError) as error:
            if name not in PEERS:
                raise
            missing[name] = f"failed a request: {error}"
            progress.print(f"{name} is left out from here: it {missing[name]}", markup=False)
        finally:
            pair.signal(signal.SIGSTOP)
    return out


def _prefill_s(server: Process) -> float:
    """Seconds that this server's requests took so far, by its own metrics."""
    return metric(server, "vllm:e2e_request_latency_seconds_sum")


def _rows(tokens: int, rounds: list[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    names = list(dict.fromkeys(name for r in rounds for name in r))
    rows = []
    for name in names:
        done = [r for r in rounds if name in r]
        others = [n for n in names if n != OURS]
        best = [
            r[OURS]["after_prefill_s"] / min(r[n]["after_prefill_s"] for n in others if n in r)
            for r in done
            if name == OURS and any(n in r for n in others)
        ]
        rows.append(
            {
                "tokens": tokens,
                "contender": name,
                **{key: median(r[name][key] for r in done) for key in ("ttft_s", "after_prefill_s")},
                "right": all(r[name]["right"] for r in done),
                "to_best": median(best) if best else None,
            }
        )
    return rows


def _text(row: dict[str, Any]) -> str:
    text = (
        f"{row['contender']} {row['ttft_s'] * 1e3:.0f} ms, {row['after_prefill_s'] * 1e3:.0f} after prefill"
    )
    if row["to_best"] is not None:
        text += f" ({row['to_best']:.2f} of the best other)"
    return text + ("" if row["right"] else ", WRONG TOKEN IDS")


def routed_rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The result as a table for people."""
    yield "prefill attention", result["prefill_attention"]
    for row in result["rows"]:
        yield f"{row['tokens']} tokens", _text(row)
    for name, why in result["missing"].items():
        yield name, f"left out: {why.splitlines()[0]}"
