# SPDX-License-Identifier: Apache-2.0
"""vLLM hands each report to one of its API servers: what they show together is what happened."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

pytest.importorskip("vllm")

from sage_kv_connector.integrations.vllm.stats import HeldByRanks, Reports, SageKVPromMetrics, SageKVStats
from sage_kv_connector.telemetry.recording.recorder import MAX_PEERS, Recorder
from sage_kv_connector.telemetry.recording.snapshot import Sample, Snapshot, TransferRecord

RANKS = 2


class ApiServer:
    """A registry of its own, as each of vLLM's API server processes has."""

    def __init__(self, connector: str = "SageKVConnector") -> None:
        self.registry = CollectorRegistry()
        kinds: dict[Any, Any] = {
            kind: lambda kind=kind, **options: kind(registry=self.registry, **options)
            for kind in (Counter, Gauge, Histogram)
        }
        config = cast(Any, type("Config", (), {"kv_transfer_config": connector}))
        self.metrics = SageKVPromMetrics(config, kinds, ["engine"], {0: ["0"]})

    def shows(self, name: str, **labels: str) -> float:
        """The sum of the samples with these labels."""
        return sum(
            sample.value
            for family in self.registry.collect()
            for sample in family.samples
            if sample.name == f"vllm:{name}" and labels.items() <= sample.labels.items()
        )


class Rank:
    """A rank's transport, as its worker sees it."""

    def __init__(self, number: int) -> None:
        self.reports = Reports(number)
        self.number = number
        self.restart()

    def restart(self) -> None:
        """Another transport takes the place of this one."""
        self.recorder, self.loads = Recorder(), 0
        self.started = getattr(self, "started", 0.0) + 1

    def ended(self, code: str, nbytes: int, seconds: float, peer: str = "p[0]") -> None:
        stages = (("connect", seconds / 4), ("wire", seconds * 3 / 4))
        self.recorder.ended(
            TransferRecord("t", "decode", peer, "tcp", "same", 0, nbytes, nbytes, 0, seconds, stages, code)
        )

    def look(self) -> None:
        samples = (*self.recorder.samples(), Sample("loads", (), self.loads))
        times = tuple(self.recorder.times())
        self.reports.hear(Snapshot("e", self.number, 1, self.started, 0, samples, times))


def step(ranks: list[Rank], held: HeldByRanks) -> dict[str, Any] | None:
    """What reaches an API server after a step: the ranks' reports put together, and the scheduler's."""
    together: SageKVStats | None = None
    for rank in ranks:
        rank.look()
        report = rank.reports.take()
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
        st.sampled_from(["ok", "checksum", "load", "restart"]),
        st.integers(1, 1 << 40),
        st.integers(0, 2),
    ),
    max_size=30,
)


@given(changes)
def test_growth_adds_up_over_api_servers(made: list[tuple[int, str, int, int]]) -> None:
    servers, ranks, held = [ApiServer(), ApiServer()], [Rank(rank) for rank in range(RANKS)], HeldByRanks()
    nbytes, ended, failed, seconds = 0, 0, 0, 0.0
    last: ApiServer | None = None
    for number, what, value, server in made:
        rank = ranks[number]
        if what == "load":
            rank.loads = value
        elif what == "restart":
            rank.look()  # as a worker does before it closes its transport
            rank.restart()
        else:
            rank.ended(what, value, value / (1 << 33))
            ended, failed = ended + (what == "ok"), failed + (what != "ok")
            nbytes += value if what == "ok" else 0
            seconds += value / (1 << 33) if what == "ok" else 0.0
        if server == 2:
            continue  # no report after this step
        data = step(ranks, held)
        if data is not None:
            last = servers[server]
            last.metrics.observe(data)
    if (data := step(ranks, held)) is not None:
        last = servers[0]
        last.metrics.observe(data)

    def shown(name: str, **labels: str) -> float:
        return sum(server.shows(name, **labels) for server in servers)

    assert shown("sage_kvt_transferred_bytes_total") == nbytes
    assert shown("sage_kvt_transfers_total", code="ok") == ended
    assert shown("sage_kvt_transfers_total", code="checksum") == failed
    assert shown("sage_kvt_transfer_seconds_count") == ended
    assert shown("sage_kvt_transfer_seconds_sum") == pytest.approx(seconds)
    assert shown("nixl_num_failed_transfers_total") == failed
    assert shown("nixl_bytes_transferred_sum") == nbytes
    assert shown("nixl_xfer_time_seconds_count") == ended
    assert shown("nixl_xfer_time_seconds_sum") == pytest.approx(seconds * 3 / 4)
    if last is not None:
        assert last.shows("sage_kvt_loads") == sum(rank.loads for rank in ranks), "who was told last is right"


def test_a_peer_that_loses_its_series_is_not_counted_twice() -> None:
    server, ranks, held = ApiServer(), [Rank(0)], HeldByRanks()
    for number in range(MAX_PEERS + 3):
        ranks[0].ended("ok", 1000, 0.1, f"p{number}[0]")
        data = step(ranks, held)
        assert data is not None
        server.metrics.observe(data)
    assert server.shows("sage_kvt_transferred_bytes_total") == 1000 * (MAX_PEERS + 3)


def test_every_code_is_shown_before_it_happens() -> None:
    server = ApiServer()
    names = {sample.name for family in server.registry.collect() for sample in family.samples}
    assert "vllm:sage_kvt_failed_loads_total" in names
    assert "vllm:sage_kvt_aborted_loads_total" in names
    assert server.shows("sage_kvt_failed_loads_total", code="prompt") == 0


def test_what_a_lane_never_counted_is_shown_as_none() -> None:
    server, rank = ApiServer(), Rank(0)
    zero = Sample("checksum_failures_total", ("tcp",), 0)
    for _ in range(2):
        rank.reports.hear(Snapshot("e", 0, 1, 1.0, 0, (zero,), ()))
        report = rank.reports.take()
        if report is not None:
            server.metrics.observe(report.data)
    assert report is None, "once is enough"
    shown = server.registry.get_sample_value(
        "vllm:sage_kvt_checksum_failures_total", {"engine": "0", "backend": "tcp"}
    )
    assert shown == 0


def test_bytes_of_transfers_that_ended_together_add_up_exactly() -> None:
    server, ranks, held = ApiServer(), [Rank(0)], HeldByRanks()
    whole, ended = 0, 0
    for times, nbytes in ((3, 100), (7, 47_185_921), (11, 1 << 40)):
        for number in range(times):
            ranks[0].ended("ok", nbytes + number % 2, 1.0)
            whole, ended = whole + nbytes + number % 2, ended + 1
        data = step(ranks, held)
        assert data is not None
        server.metrics.observe(data)
    assert server.shows("nixl_bytes_transferred_sum") == whole
    assert server.shows("nixl_bytes_transferred_count") == ended


def test_beside_nixl_its_own_names_are_left_to_it() -> None:
    names = {family.name for family in ApiServer("MultiConnector: NixlConnector").registry.collect()}
    assert not [name for name in names if "nixl" in name] and "vllm:sage_kvt_transfers" in names


def test_nothing_is_reported_twice() -> None:
    rank = Rank(0)
    rank.ended("ok", 5, 0.1)
    rank.look()
    assert rank.reports.take() is not None
    rank.look()
    assert rank.reports.take() is None


def test_what_the_log_says_is_a_number_for_each_name() -> None:
    rank = Rank(0)
    rank.ended("ok", 5, 0.1)
    rank.look()
    report = rank.reports.take()
    assert report is not None
    said = report.reduce()
    assert said["transferred_bytes"] == 5 and said["transfers"] == 1 and said["loads"] == 0


def test_a_transport_in_place_of_another_counts_from_nothing() -> None:
    server, rank, held = ApiServer(), Rank(0), HeldByRanks()
    for nbytes in (1000, 10):
        rank.ended("ok", nbytes, 0.1)
        data = step([rank], held)
        assert data is not None
        server.metrics.observe(data)
        rank.restart()
    assert server.shows("sage_kvt_transferred_bytes_total") == 1010


def test_what_is_open_is_told_as_soon_as_it_changes() -> None:
    """A server makes no more steps once nothing is open: what it told last stays."""
    reports = Reports(0)
    assert reports.due((1, 0, 1))
    reports.hear(Snapshot("e", 0, 1, 1.0, 0, (), ()), (1, 0, 1))
    assert not reports.due((1, 0, 1))
    assert reports.due((1, 0, 0)) and reports.due((2, 0, 1))
