# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench unfetched``: how many prefills lie unfetched in each state, and what its rows say."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from sage_kv_connector.bench import unfetched
from sage_kv_connector.bench.idle import SETTLE_S
from sage_kv_connector.cli.main import app


def test_each_state_has_its_prefills_and_is_watched_while_nothing_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = offers = 0.0
    asked: list[tuple[float, float]] = []

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    def complete(url: str, prompt: list[int], *, kv_transfer_params: Any = None, **_: Any) -> Any:
        nonlocal offers
        offers += kv_transfer_params is not None
        asked.append((now, offers))
        return SimpleNamespace(total_s=0.01 * len(asked))

    def cpu_seconds(server: Any) -> float:
        assert now - asked[-1][0] >= SETTLE_S, "vLLM still polls after its last request"
        return offers + (now - asked[-1][0] - SETTLE_S) * (0.25 if offers else 0.0)

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(unfetched, "complete", complete)
    monkeypatch.setattr(unfetched, "cpu_seconds", cpu_seconds)
    server: Any = SimpleNamespace(url="http://server", name="ours")
    states = list(unfetched._states(server, 20.0, 30))
    assert [(one["unfetched"], one["cpu_percent"]) for one in states] == [(0, 0.0), (1, 25.0), (30, 25.0)]
    first = [0.01 * number for number in range(2, 2 + unfetched.REQUESTS)]  # after one to warm up
    assert states[0]["request_s"] == pytest.approx(first[unfetched.REQUESTS // 2])
    assert states[0]["request_max_s"] == pytest.approx(first[-1])


def test_rows_say_what_is_left_out_and_why() -> None:
    row = {
        "contender": "ours",
        "unfetched": 7,
        "cpu_percent": 1.25,
        "request_s": 0.0123,
        "request_max_s": 0.02,
    }
    table = dict(unfetched.unfetched_rows({"rows": [row], "missing": {"NIXL": "not\nhere"}}))
    assert table["ours"] == "7 unfetched: 1.2 % of a core; a new request 12.3 ms (at most 20.0)"
    assert table["NIXL"] == "left out: not"


def test_another_peer_is_refused_by_name() -> None:
    done = CliRunner().invoke(app, ["bench", "unfetched", "--against", "mooncake"])
    assert done.exit_code == 2 and "--against" in done.output
