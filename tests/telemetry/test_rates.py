# SPDX-License-Identifier: Apache-2.0
"""Rates of two readings, whatever engines do in between; quantiles within the bucket of the true one."""

from __future__ import annotations

from math import ceil

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_kv_connector.telemetry.reading.rates import (
    Readings,
    Spread,
    spreads,
    spreads_of_late,
    utilization,
)
from sage_kv_connector.telemetry.recording.histogram import Histogram
from sage_kv_connector.telemetry.recording.metrics import BUCKETS
from sage_kv_connector.telemetry.recording.snapshot import Sample, Snapshot, Times

counts = st.integers(0, 1 << 40)


def at(
    taken: float,
    sent: float = 0,
    *,
    engine: str = "e",
    started: float = 0.0,
    process: int = 1,
    peer: str = "p",
) -> Snapshot:
    samples = (Sample("link_bytes_total", (peer, "tcp", "sent"), sent), Sample("offers", (), sent))
    return Snapshot(engine, 0, process, started, taken, samples, ())


@given(st.lists(st.tuples(counts, st.floats(0.01, 100)), min_size=2, max_size=10))
def test_a_rate_is_what_was_added_over_the_time_between(steps: list[tuple[int, float]]) -> None:
    readings, total, now, moved = Readings(), 0, 0.0, 0.0
    for number, (more, seconds) in enumerate(steps):
        total, now = total + more, now + seconds
        (rates,) = readings.take([at(now, total)])
        if number == 0:
            assert rates is None, "one reading has no rate"
            continue
        assert rates is not None and rates.seconds == pytest.approx(seconds)
        assert rates.per_second("link_bytes_total", direction="sent") == pytest.approx(more / seconds)
        assert rates.per_second("link_bytes_total", direction="landed") == 0
        assert rates.per_second("link_bytes_total", peer="another") == 0
        moved += rates.per_second("link_bytes_total") * rates.seconds
    assert moved == pytest.approx(total - steps[0][0]), "nothing is counted twice and nothing left out"


@given(before=counts, after=counts, gap=st.floats(0, 5), up=st.floats(0.01, 5))
def test_an_engine_that_restarted_begins_at_nothing(before: int, after: int, gap: float, up: float) -> None:
    readings = Readings()
    readings.take([at(10.0, before)])
    started = 10.0 + gap
    for process in (1, 2):  # another transport in the same process, and another process
        again = Readings()
        again.take([at(10.0, before)])
        (rates,) = again.take([at(started + up, after, started=started, process=process)])
        assert rates is not None and rates.seconds == pytest.approx(up)
        assert rates.per_second("link_bytes_total") == pytest.approx(after / up)


@given(counts, counts)
def test_a_new_engine_has_a_rate_only_if_it_began_since_the_last_reading(old: int, new: int) -> None:
    readings = Readings()
    assert readings.take([]) == []
    readings.take([at(10.0, 5)])
    known, young, unseen = readings.take(
        [
            at(12.0, 5),
            at(12.0, new, engine="young", started=11.0),
            at(12.0, old, engine="unseen", started=3.0),
        ]
    )
    assert known is not None and known.per_second("link_bytes_total") == 0
    assert young is not None and young.per_second("link_bytes_total") == new
    assert unseen is None, "its counters are of a time that nobody knows"
    *_, unseen = readings.take([at(13.0, 5), at(13.0, old + 7, engine="unseen", started=3.0)])
    assert unseen is not None and unseen.per_second("link_bytes_total") == 7


def test_a_clock_that_stands_or_goes_back_has_no_rate() -> None:
    for later in (10.0, 9.0):
        readings = Readings()
        readings.take([at(10.0, 5)])
        assert readings.take([at(later, 9)]) == [None]


def test_bytes_of_a_peer_that_lost_its_series_are_not_counted_again() -> None:
    readings = Readings()
    readings.take([at(1.0, 1000)])
    (rates,) = readings.take([at(2.0, 1010, peer="other")])
    assert rates is not None and rates.per_second("link_bytes_total") == 10


@given(st.lists(st.floats(0, 300), min_size=1, max_size=200), st.floats(0, 1))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(seconds: list[float], share: float) -> None:
    made = Histogram()
    for one in seconds:
        made.add(one)
    spread = Spread()
    spread.add(Times("transfer_seconds", ("decode", "tcp"), tuple(made.counts), tuple(made.seconds)))
    true = sorted(seconds)[max(1, ceil(share * len(seconds))) - 1]
    found = spread.quantile(share)
    assert found is not None and spread.count == len(seconds)
    if true > BUCKETS[-1]:
        longest = [one for one in seconds if one > BUCKETS[-1]]
        assert found == pytest.approx(sum(longest) / len(longest))
    elif true > BUCKETS[0]:
        assert true / 2 <= found <= true * 2
    else:
        assert 0 <= found <= BUCKETS[0]
    quantiles = [spread.quantile(one / 20) or 0.0 for one in range(21)]
    assert quantiles == sorted(quantiles)


def test_nothing_timed_has_no_quantile() -> None:
    assert Spread().quantile(0.5) is None


def test_histograms_are_added_up_by_labels_and_of_late_only_what_is_new() -> None:
    def timed(taken: float, *seconds: float) -> Snapshot:
        made = Histogram()
        for one in seconds:
            made.add(one)
        times = Times("stage_seconds", ("decode", "wire"), tuple(made.counts), tuple(made.seconds))
        return msgspec.structs.replace(at(taken), times=(times,))

    readings = Readings()
    readings.take([timed(1.0, 0.5)])
    later = timed(2.0, 0.5, 0.001, 0.002)
    late = spreads_of_late("stage_seconds", [*readings.take([later]), None])
    assert late["decode", "wire"].count == 2
    assert late["decode", "wire"].seconds == pytest.approx(0.003)
    both = spreads("stage_seconds", [later, later])
    assert both["decode", "wire"].count == 6 and spreads("transfer_seconds", [later]) == {}


def test_utilization_is_known_only_with_rate_and_capacity() -> None:
    assert utilization(50.0, 100.0) == 0.5
    assert utilization(None, 100.0) is None
    assert utilization(50.0, 0.0) is None
