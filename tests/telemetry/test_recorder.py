# SPDX-License-Identifier: Apache-2.0
"""What the recorder keeps: right sums, bounded memory, nothing lost when a peer loses its series."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_kv_connector.contract.prompt import Prompt
from sage_kv_connector.telemetry.recording import snapshot as snapshots
from sage_kv_connector.telemetry.recording.histogram import Histogram
from sage_kv_connector.telemetry.recording.hot_chunks import MOST, HotChunks
from sage_kv_connector.telemetry.recording.metrics import BUCKETS, METRICS, Kind
from sage_kv_connector.telemetry.recording.recorder import (
    MAX_PEERS,
    MAX_TRANSFERS,
    OTHER,
    LinkBytes,
    Recorder,
)
from sage_kv_connector.telemetry.recording.snapshot import Sample, Snapshot, TransferRecord


def record(
    peer: str = "p[0]", *, code: str = "ok", nbytes: int = 100, seconds: float = 0.5
) -> TransferRecord:
    stages = (
        ("connect", seconds / 5),
        ("wait", seconds / 5),
        ("wire", seconds / 2),
        ("report", seconds / 10),
    )
    return TransferRecord(
        "t", "decode", peer, "tcp", "same", 0, nbytes, 2 * nbytes, 1.0, seconds, stages, code
    )


def total(recorder: Recorder, metric: str, **labels: str) -> float:
    return Snapshot("e", 0, 1, 0, 0, tuple(recorder.samples()), ()).value(metric, **labels)


def test_a_transfer_counts_once_with_all_its_labels() -> None:
    recorder = Recorder()
    recorder.ended(record())
    recorder.ended(record(code="checksum"))
    assert total(recorder, "transfers_total", code="ok", peer="p[0]", side="decode", backend="tcp") == 1
    assert total(recorder, "transfers_total", code="checksum") == 1
    assert total(recorder, "transferred_bytes_total") == 100, "a failed one moved nothing of use"
    assert total(recorder, "kv_bytes_total") == 200
    assert total(recorder, "lost_seconds_total", code="checksum") == 0.5
    assert total(recorder, "link_capacity_bytes_per_second", source="best") == 100 / 0.25
    stages = {times.labels: times for times in recorder.times() if times.metric == "stage_seconds"}
    assert sum(stages["decode", "wire"].seconds) == 0.25
    assert sum(stages["decode", "wire"].counts) == 1


def test_peers_beyond_the_bound_go_on_as_other_and_no_byte_is_lost() -> None:
    recorder, peers = Recorder(), 3 * MAX_PEERS
    for number in range(peers):
        recorder.ended(record(f"p{number}[0]"))
    named = {s.labels[1] for s in recorder.samples() if s.metric == "transfers_total"}
    assert len(named) == MAX_PEERS + 1 and OTHER in named
    assert total(recorder, "transferred_bytes_total") == 100 * peers
    assert total(recorder, "transferred_bytes_total", peer=OTHER) == 100 * (peers - MAX_PEERS)
    recorder.ended(record("p0[0]"))  # it is back
    assert total(recorder, "transferred_bytes_total", peer="p0[0]") == 100
    assert len(recorder.transfers()) == MAX_TRANSFERS


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 50), st.booleans()), max_size=60))
def test_bytes_of_links_only_grow_and_are_right_at_the_end(moves: list[tuple[int, int, bool]]) -> None:
    """Connections move bytes, are read now and then, and close."""
    recorder, now, connection = Recorder(), [0, 0, 0, 0], [0, 1, 2, 3]
    expected, before = 0, 0.0
    for which, more, closes in moves:
        now[which] += more
        expected += more
        link = LinkBytes("tcp", connection[which], "p", now[which], 0)
        if closes:
            recorder.closed(link)
            connection[which] += 4
            now[which] = 0
        else:
            recorder.links(lambda link=link: [link])  # type: ignore[misc]
        found = total(recorder, "link_bytes_total", direction="sent")
        assert found >= before
        before = found
    for which in range(4):
        recorder.closed(LinkBytes("tcp", connection[which], "p", now[which], 0))
    assert total(recorder, "link_bytes_total") == expected
    assert not recorder._told, "a connection that closed is forgotten"


def test_a_metric_with_wrong_labels_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"retries_total is a counter with labels \('why',\), given \(\)"):
        Recorder().add("retries_total")


@given(st.floats(0, 200))
def test_a_time_lies_in_the_bucket_that_names_its_upper_end(seconds: float) -> None:
    histogram = Histogram()
    histogram.add(seconds)
    bucket = histogram.counts.index(1)
    lower = BUCKETS[bucket - 1] if bucket else -1.0
    upper = BUCKETS[bucket] if bucket < len(BUCKETS) else float("inf")
    assert lower < seconds <= upper and histogram.seconds[bucket] == seconds


def test_what_is_handed_over_again_and_again_is_found_among_much_else() -> None:
    hot, common = HotChunks(), Prompt(range(512)).chunks(256, 8)
    for number in range(4 * MOST):
        for _ in range(2):
            hot.add(Prompt(range(1000 + number, 1256 + number)).chunks(256, 8))
        if number > 2 * MOST and number % 2 == 0:
            hot.add(common)
    found = hot.hottest(2)
    assert {chunk.digest for chunk in found} == {chunk.digest.hex() for chunk in common}
    assert [chunk.tokens for chunk in sorted(found, key=lambda chunk: chunk.tokens)] == [256, 512]
    assert len(hot._counts) <= MOST


def test_prompts_that_begin_alike_share_their_first_chunks_only() -> None:
    one = Prompt([*range(600)]).chunks(256, 8)
    other = Prompt([*range(300), 7, *range(301, 600)]).chunks(256, 8)
    assert len(one) == 2 and one[0] == other[0] and one[1] != other[1]
    assert Prompt(range(600), salt="s").chunks(256, 8)[0] != one[0]
    assert len(Prompt(range(600)).chunks(256, 1)) == 1


def test_a_snapshot_is_what_was_encoded_and_another_version_is_refused() -> None:
    recorder = Recorder()
    recorder.ended(record())
    taken = Snapshot("e", 1, 2, 0.0, 1.0, tuple(recorder.samples()), tuple(recorder.times()))
    assert snapshots.decode(snapshots.encode(taken)) == taken
    with pytest.raises(ValueError, match="version: 9 is not known, allowed: 1"):
        snapshots.decode(snapshots.encode(taken).replace(b'"version":1', b'"version":9'))
    with pytest.raises(ValueError, match=r"not a telemetry snapshot: .*samples"):
        snapshots.decode(snapshots.encode(taken).replace(b'"samples":[', b'"samples":[1,'))


def test_the_table_keeps_to_prometheus_names() -> None:
    for name, metric in METRICS.items():
        assert name == metric.name
        assert (metric.kind is Kind.COUNTER) == name.endswith("_total")
        assert not any(unit in name for unit in ("_ns", "_ms", "_us", "_mb")), name
        assert "le" not in metric.labels
    assert all(upper / lower == 2 for lower, upper in pairwise(BUCKETS))
    assert Sample("offers", (), 1.0).key.labels == ()
