# SPDX-License-Identifier: Apache-2.0
"""What grows is seen as growing, and what only varies is not."""

from __future__ import annotations

import random
from typing import Any

import pytest

from sage_kv_connector.bench.ab import stable
from sage_kv_connector.bench.ab.stable import _rows, slopes


def row(minute: int, **more: float) -> dict[str, Any]:
    return {
        "minute": minute,
        "ttft_p50_s": 1.0,
        "ttft_p99_s": 2.0,
        "memory_bytes": 1000,
        "descriptors": 50,
        "machine_s": 0.003,
        **more,
    }


def test_a_leak_is_a_slope() -> None:
    found = slopes([row(minute, memory_bytes=1000 + 2 * minute) for minute in range(120)])
    memory = found["memory_bytes"]
    assert memory["an_hour"] == pytest.approx(120) and memory["interval"][0] == pytest.approx(120)
    assert memory["of_median"] == pytest.approx(120 / (1000 + 2 * 65.5), rel=0.01)
    assert found["descriptors"]["an_hour"] == pytest.approx(0, abs=1e-9)


def test_noise_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stable, "RESAMPLES", 100)
    held = 0
    for seed in range(20):
        source = random.Random(seed)
        rows = [row(minute, ttft_p50_s=source.gauss(1, 0.2)) for minute in range(120)]
        low, high = slopes(rows)["ttft_p50_s"]["interval"]
        held += low < 0 < high
    assert held > 15, "19 are expected"


def test_what_fills_at_the_beginning_is_left_out() -> None:
    rows = [row(minute, memory_bytes=min(minute, 10) * 100 + 1) for minute in range(100)]
    assert slopes(rows)["memory_bytes"]["an_hour"] == pytest.approx(0, abs=1e-6)


def test_two_rows_have_no_slope() -> None:
    assert slopes([row(0), row(1)]) == {}


def test_a_row_is_a_minute_of_arrivals() -> None:
    def one(at_s: float, ttft_s: float) -> dict[str, Any]:
        return {"at_s": at_s, "prefill_s": 0.5, "ttft_s": ttft_s, "rest_s": 0.7}

    done = [one(1, 0.5), one(59, 1.5), {"at_s": 70, "error": "no"}, one(130, 2.5)]
    held = [
        {"at_s": at_s, "memory_bytes": at_s, "descriptors": 7, "machine_s": at_s / 10}
        for at_s in (10, 50, 110, 170)
    ]
    rows = list(_rows(done, held))
    assert [
        (r["minute"], r["requests"], r["ttft_p50_s"], r["memory_bytes"], r["machine_s"]) for r in rows
    ] == [
        (0, 2, 1.5, 50, 3.0),
        (2, 1, 3.0, 170, 17.0),
    ]
