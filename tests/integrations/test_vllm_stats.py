# SPDX-License-Identifier: Apache-2.0
"""vLLM hands each report to one of its API servers: what they show together is what happened."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

pytest.importorskip("vllm")

from sage_kv_connector.integrations.vllm.stats import (
    COUNTERS,
    FAILURES,
    GAUGES,
    HeldByRanks,
    Reports,
    SageKVPromMetrics,
    SageKVStats,
    Totals,
)

RANKS = 2


class ApiServer:
    """A registry of its own, as each of vLLM's API server processes has."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kinds: dict[Any, Any] = {
            kind: lambda kind=kind, **options: kind(registry=self.registry, **options)
            for kind in (Counter, Gauge)
        }
        config = cast(Any, type("Config", (), {"kv_transfer_config": None}))
        kinds[Histogram] = Histogram  # asked for by vLLM's base, used by nobody here
        self.metrics = SageKVPromMetrics(config, kinds, ["engine"], {0: ["0"]})

    def shows(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"vllm:sage_kvt_{name}", {"engine": "0", **labels})


def step(totals: list[Totals], ranks: list[Reports], held: HeldByRanks) -> dict[str, Any] | None:
    """What reaches an API server after a step: the ranks' reports put together, and the scheduler's."""
    together: SageKVStats | None = None
    for report in (rank.take(total) for rank, total in zip(ranks, totals, strict=True)):
        if report is not None:
            together = report if together is None else together.aggregate(report)
    held.hear(together)
    known = held.take()
    if known is not None:
        together = known if together is None else together.aggregate(known)
    return None if together is None else together.data


changes = st.lists(
    st.tuples(
        st.integers(0, RANKS - 1),
        st.sampled_from([*COUNTERS, *GAUGES, *FAILURES]),
        st.integers(0, 1 << 40),
        st.integers(0, 1),
    ),
    max_size=30,
)


@given(changes)
def test_growth_adds_up_over_api_servers(made: list[tuple[int, str, int, int]]) -> None:
    servers, ranks, held = [ApiServer(), ApiServer()], [Reports(rank) for rank in range(RANKS)], HeldByRanks()
    counters: list[dict[str, int]] = [{} for _ in range(RANKS)]
    failures: list[dict[str, dict[str, int]]] = [{} for _ in range(RANKS)]
    last: ApiServer | None = None
    for rank, name, value, server in made:
        if name in GAUGES:
            counters[rank][name] = value
        elif name in COUNTERS:
            counters[rank][name] = counters[rank].get(name, 0) + value
        else:
            codes = failures[rank].setdefault(name, {})
            codes["expired"] = codes.get("expired", 0) + value % 5
        totals = [
            Totals(dict(c), {n: dict(f) for n, f in fs.items()})
            for c, fs in zip(counters, failures, strict=True)
        ]
        data = step(totals, ranks, held)
        if data is not None:
            last = servers[server]
            last.metrics.observe(data)
    for name in COUNTERS:
        shown = sum(server.shows(f"{name}_total") or 0 for server in servers)
        assert shown == sum(of_rank.get(name, 0) for of_rank in counters)
    for name in FAILURES:
        shown = sum(server.shows(f"{name}_total", code="expired") or 0 for server in servers)
        assert shown == sum(of_rank.get(name, {}).get("expired", 0) for of_rank in failures)
    if last is None:
        return
    for name in GAUGES:
        assert last.shows(name) == sum(of_rank.get(name, 0) for of_rank in counters), (
            "who was told last is right"
        )


def test_every_code_is_shown_before_it_happens() -> None:
    server = ApiServer()
    assert server.shows("failed_loads_total", code="prompt") == 0
    assert server.shows("bytes_sent_total") == 0


def test_nothing_is_reported_twice() -> None:
    reports, totals = Reports(0), Totals({"bytes_sent": 5, "loads": 1}, {"failed_loads": {"prompt": 1}})
    assert reports.take(totals) is not None
    assert reports.take(totals) is None
