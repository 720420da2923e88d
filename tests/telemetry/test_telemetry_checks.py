# SPDX-License-Identifier: Apache-2.0
"""The check of metrics on real servers notices a byte, a failure, a stage and a gauge that is told wrong."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest

from integration_tests.scraped import NOTHING, Scrape
from integration_tests.telemetry_checks import (
    Between,
    Ledger,
    Moved,
    not_moved,
    stages_gap,
    wrong_bytes,
    wrong_failures,
    wrong_gauges,
    wrong_sides,
)
from sage_kv_connector.telemetry.recording.metrics import METRICS

#: 100 bytes came, one load failed for its prompt, after 2 s of which the stages fill all.
DECODE = """\
vllm:sage_kvt_transfers_total{code="ok",engine="0",side="decode"} 1
vllm:sage_kvt_transfers_total{code="prompt",engine="0",side="decode"} 1
vllm:sage_kvt_failed_loads_total{code="prompt",engine="0"} 1
vllm:sage_kvt_transferred_bytes_total{engine="0",side="decode"} 100
vllm:sage_kvt_kv_bytes_total{engine="0",side="decode"} 100
vllm:sage_kvt_link_bytes_total{direction="landed",engine="0"} 100
vllm:sage_kvt_transfer_seconds_sum{engine="0",side="decode"} 2
vllm:sage_kvt_stage_seconds_sum{engine="0",side="decode",stage="wait"} 1.5
vllm:sage_kvt_stage_seconds_sum{engine="0",side="decode",stage="wire"} 0.5
vllm:sage_kvt_sessions{engine="0"} 1
vllm:nixl_bytes_transferred_sum{engine="0"} 100
vllm:nixl_xfer_time_seconds_count{engine="0"} 1
vllm:nixl_num_failed_transfers_total{engine="0"} 1
"""
PREFILL = """\
vllm:sage_kvt_transfers_total{code="ok",engine="0",side="prefill"} 1
vllm:sage_kvt_transferred_bytes_total{engine="0",side="prefill"} 100
vllm:sage_kvt_link_bytes_total{direction="sent",engine="0"} 100
"""


def known() -> Ledger:
    ledger = Ledger()
    ledger.moved(100)
    ledger.failed("decode", "failed_loads_total", code="prompt")
    ledger.failed("decode", "transfers_total", side="decode", code="prompt")
    return ledger


def wrong(decode: str, prefill: str = PREFILL) -> list[str]:
    came = Between("decode", "/metrics", NOTHING, Scrape(decode))
    left = Between("prefill", "/metrics", NOTHING, Scrape(prefill))
    ledger = known()
    return [
        sentence
        for between in (came, left)
        for found in (wrong_bytes(between, ledger), wrong_failures(between, ledger))
        for sentence in found
    ] + list(wrong_sides(left, came, ledger))


def test_what_is_told_right_is_right() -> None:
    assert wrong(DECODE) == []
    assert stages_gap(Scrape(DECODE), "decode") == 0


@pytest.mark.parametrize(
    ("told", "instead", "sentence"),
    [
        ('kv_bytes_total{engine="0",side="decode"} 100', "50", "kv_bytes_total grew by 50, expected 100"),
        ('link_bytes_total{direction="landed",engine="0"} 100', "99", "link_bytes_total grew by 99"),
        ('nixl_bytes_transferred_sum{engine="0"} 100', "1", "nixl_bytes_transferred grew by 1"),
        ('failed_loads_total{code="prompt",engine="0"} 1', "2", "grew by 2, 1 were injected"),
        ('num_failed_transfers_total{engine="0"} 1', "0", "nixl_num_failed_transfers grew by 0"),
    ],
)
def test_a_number_that_is_told_wrong_is_noticed(told: str, instead: str, sentence: str) -> None:
    changed = DECODE.replace(told, f"{told.rpartition(' ')[0]} {instead}")
    assert changed != DECODE
    assert any(sentence in one for one in wrong(changed))


def test_a_failure_that_nobody_injected_is_noticed() -> None:
    more = DECODE + 'vllm:sage_kvt_failed_loads_total{code="checksum",engine="0"} 1\n'
    assert wrong(more) == [
        'decode, /metrics: failed_loads_total{code="checksum"} grew by 1, 0 were injected',
    ]


def test_bytes_that_left_and_did_not_come_are_noticed() -> None:
    more = PREFILL.replace('direction="sent",engine="0"} 100', 'direction="sent",engine="0"} 101')
    assert "/metrics: 1 bytes more left prefill's lanes than came to decode's" in wrong(DECODE, more)


def test_a_stage_that_is_left_out_is_a_gap() -> None:
    without = re.sub(r'.*stage="wire".*\n', "", DECODE)
    assert stages_gap(Scrape(without), "decode") == pytest.approx(0.25)


def test_a_gauge_that_was_not_told_of_is_noticed() -> None:
    exporter = Scrape('sage_kvt_sessions{engine="e",rank="0"} 0\n')
    assert list(wrong_gauges("decode", Scrape(DECODE), exporter)) == [
        "decode: sessions is 1 at /metrics, 0 at the exporter"
    ]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda text: text.replace('side="prefill"} 100', 'side="prefill"} 99'), "went from 100 back to 99"),
        (lambda text: re.sub(r".*transferred_bytes.*\n", "", text), "is gone"),
    ],
)
def test_what_goes_back_is_noticed(change: Callable[[str], str], sentence: str) -> None:
    moved = Moved()
    moved.hear("prefill", Scrape(PREFILL))
    moved.hear("prefill", Scrape(PREFILL))
    assert not moved.backwards
    moved.hear("prefill", Scrape(change(PREFILL)))
    assert len(moved.backwards) == 1 and sentence in moved.backwards[0]
    moved.begins_anew("prefill")
    moved.hear("prefill", NOTHING)
    assert len(moved.backwards) == 1


def test_what_does_not_move_needs_a_reason() -> None:
    moved = set(METRICS) - {"stalls_total", "sessions"}
    assert not_moved(moved, {"stalls_total": "there is room"}) == (
        {"sage_kvt_stalls_total": "there is room"},
        ["sage_kvt_sessions did not move"],
    )


def test_of_two_ends_the_one_that_came_counts() -> None:
    ledger = Ledger()
    ledger.either["decode"].append(("a", "b"))
    for said in (Counter(a=1), Counter(b=1)):
        assert ledger.wanted("decode", said) == said
