# SPDX-License-Identifier: Apache-2.0
"""What is made of turns: medians, shares of the link, ratios to the best peer with intervals; and what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sage_kv_connector.bench.ab.figures import figures
from sage_kv_connector.bench.ab.kept import Kept, Left
from sage_kv_connector.bench.ab.suites import Case

CASE = Case("1g", 8192, "closed-1", "sequential", 3)
LINKS = {"1g": {"payload_bytes_s": 99.0, "link_bytes_s": 100.0}}


def one(begun_s: float, seconds: float, **more: Any) -> dict[str, Any]:
    """Answered ``seconds`` after it was sent; a fifth of it was prefill's, each later token took 0.1 s."""
    answer = {"prefill_s": seconds / 5, "ttft_s": seconds * 4 / 5, "rest_s": 0.3, "token_ids": [1, 2, 3, 4]}
    return {"begun_s": begun_s, "prompt_tokens": 1000, **answer, "ended_s": begun_s + seconds, **more}


def failed(begun_s: float) -> dict[str, Any]:
    return {"begun_s": begun_s, "prompt_tokens": 1000, "error": "no", "ended_s": begun_s + 1}


def turn(arm: str, done: list[dict[str, Any]], number: int = 0, case: Case = CASE) -> dict[str, Any]:
    cpu = {"prefill": {"engine": 3.0}, "decode": {"engine": 2.0, "transport": 1.0}}
    spent = {"cpu_s": cpu, "memory_bytes": 10 + number, "wire_bytes": 150, "busy_bytes": 96, "busy_s": 1.0}
    return {**case._asdict(), "arm": arm, "round": number, "done": done, "spent": spent}


def cases_of(*turns: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {case["arm"]: case for case in figures(turns, LINKS)["cases"]}


def test_requests_of_all_rounds_count() -> None:
    turns = [turn("ours-bf16", [one(0, 1), one(1, 2), one(3, 1)]), turn("ours-bf16", [one(5, 3)], 1)]
    case = cases_of(*turns)["ours-bf16"]
    assert case["requests"] == 4 and case["ttft_p50_s"] == 1.5 and case["ttft_p99_s"] == pytest.approx(2.97)
    assert case["after_prefill_p50_s"] == pytest.approx(1.2) and case["tpot_s"] == pytest.approx(0.1)
    assert case["throughput"] == pytest.approx(4000 / 7)  # 4 s and 3 s
    assert case["utilization"] == pytest.approx(300 / 7 / 100) and case["wire_bytes"] == 75
    assert case["busy_utilization"] == pytest.approx(0.96)
    assert case["cpu_s"] == {"prefill": {"engine": 1.5}, "decode": {"engine": 1.0, "transport": 0.5}}
    assert case["memory_bytes"] == 11


def test_wrong_is_what_one_server_is_sure_of_and_the_arm_loses_nothing() -> None:
    done = [
        one(0, 1, equal=0.5, sure=True),
        one(1, 1, equal=0.5, sure=False),
        one(2, 1, equal=1.0, sure=True),
    ]
    found = cases_of(*(turn(arm, done) for arm in ("ours-bf16", "ours-int4", "nixl-pull")))
    assert {arm: case["wrong"] for arm, case in found.items()} == {
        "ours-bf16": 1,
        "ours-int4": None,
        "nixl-pull": 1,
    }
    assert found["ours-int4"]["agreement"] == pytest.approx(2 / 3) and found["ours-int4"]["judged"] == 3


def test_what_failed_is_counted_and_is_not_good() -> None:
    unloaded = turn("nixl-pull", [one(0, 1)])
    case = cases_of(unloaded, turn("ours-bf16", [one(0, 2), one(2, 2.5), failed(5), one(6, 1)]))["ours-bf16"]
    assert (case["requests"], case["failed"], case["target_ttft_s"]) == (4, 1, 2.0)
    assert case["goodput"] == 0.5 and case["throughput"] == pytest.approx(3000 / 7)
    nothing = cases_of(turn("ours-bf16", [failed(0)]))["ours-bf16"]
    assert nothing["ttft_p50_s"] is None and nothing["throughput"] == 0


def ratios(*turns: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Those to the best peer."""
    return {one["what"]: one for one in figures(turns, LINKS)["ratios"] if one["best"]}


def test_ours_is_compared_with_the_best_peer_in_each_figure() -> None:
    fast, slow = [one(0, 1), one(1, 1)], [one(0, 4), one(4, 4)]
    found = ratios(turn("ours-int4", fast), turn("nixl-pull", [one(0, 2), one(2, 2)]), turn("mooncake", slow))
    times = dict.fromkeys(("ttft_p50", "ttft_p99", "after_prefill_p50"), ("nixl-pull", 0.5))
    seen = {what: (of["peer"], round(of["ratio"], 3)) for what, of in found.items() if what != "tpot"}
    assert seen == {"throughput": ("nixl-pull", 2.0), **times} and found["tpot"]["ratio"] == pytest.approx(1)
    assert found["ttft_p50"]["interval"] == [0.5, 0.5]


def test_an_interval_holds_the_ratio_and_says_how_much_requests_differ() -> None:
    ours = turn("ours-bf16", [one(i, 1 + i % 5 / 10) for i in range(40)])
    found = ratios(ours, turn("nixl-pull", [one(i, 2 + i % 7 / 10) for i in range(40)]))["ttft_p50"]
    low, high = found["interval"]
    assert low < found["ratio"] < high < 0.7


def test_a_peer_that_failed_is_no_rival_and_one_that_knows_no_other_dispatch_is() -> None:
    both = CASE._replace(dispatch="concurrent")
    found = ratios(
        turn("ours-bf16", [one(0, 1)], case=both),
        turn("nixl-pull", [one(0, 2)]),
        turn("mooncake", [failed(0)], case=both),
    )
    assert found["ttft_p50"]["peer"] == "nixl-pull" and found["ttft_p50"]["ratio"] == 0.5
    assert not ratios(turn("ours-bf16", [one(0, 1)]), turn("nixl-pull", [failed(0)]))
    assert not ratios(turn("ours-bf16", [failed(0)]), turn("nixl-pull", [one(0, 1)]))


def test_a_run_goes_on_from_its_file(tmp_path: Path) -> None:
    path, about = tmp_path / "state", {"suite": "quick", "commit": "1"}
    first = Kept(path, about)
    first.add_link("1g", LINKS["1g"])
    first.add_turn(CASE, "ours-bf16", 1, {"done": [one(0, 1)], "spent": {}})
    again = Kept(path, about)
    assert (again.turns, again.links) == (first.turns, LINKS)
    assert again.has(CASE, "ours-bf16", 1)
    assert not again.has(CASE, "ours-bf16", 0) and not again.has(CASE, "mooncake", 1)
    assert not again.has(CASE._replace(tokens=1), "ours-bf16", 1)
    with pytest.raises(ValueError, match="name another file"):
        Kept(path, about | {"commit": "2"})


def test_a_line_that_was_cut_off_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "state"
    kept = Kept(path, {})
    for arm in ("ours-bf16", "mooncake"):
        kept.add_turn(CASE, arm, 0, {"done": [], "spent": {}})
    path.write_text(path.read_text()[:-20])
    again = Kept(path, {})
    assert again.has(CASE, "ours-bf16", 0) and not again.has(CASE, "mooncake", 0)
    again.add_turn(CASE, "mooncake", 0, {"done": [], "spent": {}})
    assert len(Kept(path, {}).turns) == 2


def test_the_time_left_is_as_long_as_the_turns_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("sage_kv_connector.bench.ab.kept.time.monotonic", lambda: now[0])
    left = Left(10)
    now[0] = 120.0
    assert left.after() == "9 turns left, about 18 min"
    assert left.after(9) == "0 turns left, about 0 min"
