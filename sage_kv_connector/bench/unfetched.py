# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench unfetched``: what finished prefills that nobody fetches cost the server that holds them.

One server at a time, ours and then NIXL's, on one half of the cores. Each is watched with none of them, with one and
with many: CPU of all its processes while nothing happens, and how long a new small request takes, one a second. Leases
are longer than the run. The first state is the floor that the others are held against.
"""

from __future__ import annotations

import random
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from sage_kv_connector.bench.idle import SETTLE_S, cpu_seconds
from sage_kv_connector.bench.server_pairs import why_missing, with_baselines
from sage_kv_connector.config import SECRET_ENV
from sage_kv_connector.console import progress
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.launch.process import Process, ServerError, core_halves, running
from sage_kv_connector.launch.tiny_model import build
from sage_kv_connector.launch.vllm import PREFILL_PARAMS, VllmOptions, complete, vllm_server

OURS, PEER = "ours", "NIXL"
LEASE_S = 3600
TOKENS = 16
#: Small requests that are timed in each state, and the time from one to the next.
REQUESTS = 11
APART_S = 1.0


def bench_unfetched(seconds: float, offers: int, *, peers: bool) -> dict[str, Any]:
    """``rows``: by contender and unfetched prefills, CPU in % of a core and seconds of a new request.

    A peer that can't run is in ``missing`` with the reason. Raises ServerError where ours fails.
    """
    contenders: dict[str, tuple[str | dict[str, Any], dict[str, str]]] = {
        OURS: (f"sage_kvt:host=127.0.0.1,lease_s={LEASE_S}", {SECRET_ENV: secrets.token_urlsafe(16)})
    }
    if peers:
        contenders[PEER] = _nixl()
    rows, missing = [], {}
    with tempfile.TemporaryDirectory(prefix="sage-kvt-bench-") as name:
        directory = Path(name)
        model = build(directory, "small")
        for contender, (connector, env) in contenders.items():
            options = VllmOptions(model, directory, 1024, env=env)
            server = vllm_server(contender, options, connector, core_halves()[0])
            try:
                with running(server):
                    rows += [{"contender": contender, **state} for state in _states(server, seconds, offers)]
            except ServerError as error:
                if contender == OURS:
                    raise
                missing[contender] = why_missing("nixl", error)
    return {"seconds": seconds, "rows": rows, "missing": missing}


def _nixl() -> tuple[dict[str, Any], dict[str, str]]:
    with_baselines()
    from baselines.vllm_nixl import nixl

    prefill = nixl("cma", (free_port(), free_port())).prefill
    assert isinstance(prefill.kv_transfer_config, dict)
    lease = {"kv_connector_extra_config": {"kv_lease_duration": LEASE_S}}
    return {**prefill.kv_transfer_config, **lease}, prefill.env


def _states(server: Process, seconds: float, offers: int) -> Iterator[dict[str, Any]]:
    _small_request(server)
    held = 0
    for count in (0, 1, offers):
        while held < count:
            complete(server.url, _prompt(), max_tokens=1, kv_transfer_params=PREFILL_PARAMS, stream=False)
            held += 1
        time.sleep(SETTLE_S)
        before = cpu_seconds(server)
        time.sleep(seconds)
        cpu = 100 * (cpu_seconds(server) - before) / seconds
        took = sorted(_small_request(server) for _ in range(REQUESTS))
        state = {"unfetched": held, "cpu_percent": cpu, "request_s": median(took), "request_max_s": took[-1]}
        progress.print(f"{server.name}: {_text(state)}")
        yield state


def _small_request(server: Process) -> float:
    """Seconds that it took."""
    time.sleep(APART_S)
    return complete(server.url, _prompt(), max_tokens=1, stream=False).total_s


def _prompt() -> list[int]:
    """No two share a page."""
    return [random.randint(1, 255) for _ in range(TOKENS)]


def _text(row: dict[str, Any]) -> str:
    return (
        f"{row['unfetched']} unfetched: {row['cpu_percent']:.1f} % of a core; a new request "
        f"{row['request_s'] * 1e3:.1f} ms (at most {row['request_max_s'] * 1e3:.1f})"
    )


def unfetched_rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The result as a table for people."""
    for row in result["rows"]:
        yield row["contender"], _text(row)
    for name, why in result["missing"].items():
        yield name, f"left out: {why.splitlines()[0]}"
