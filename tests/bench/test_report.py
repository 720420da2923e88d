# SPDX-License-Identifier: Apache-2.0
"""The report's first table: what was promised against what was measured, and a cause for each miss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sage_kv_connector.bench.report import document
from sage_kv_connector.bench.report.document import ReportError, write_report
from sage_kv_connector.bench.report.goals import verdicts

CASE = {"link": "1g", "tokens": 32768, "load": "closed-4", "dispatch": "sequential", "arm": "ours-int4"}


def ratio(what: str, value: float, **more: Any) -> dict[str, Any]:
    row = CASE | {"what": what, "peer": "nixl-pull", "best": True, "ratio": value}
    return row | {"interval": [value - 0.1, value + 0.1]} | more


def case(**more: Any) -> dict[str, Any]:
    times = dict.fromkeys(("ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "after_prefill_p50_s"), 2.0)
    cpu = {"prefill": {"engine": 1.0, "conversion": 0.1}, "decode": {"conversion": 0.1, "transport": 0.2}}
    figures = {"throughput": 9000.0, "tpot_s": 0.0, "utilization": 0.97, "wire_bytes": 10, "cpu_s": cpu}
    answers = {"failed": 0, "wrong": None, "judged": 4, "agreement": 0.5, "goodput": None, "requests": 4}
    return CASE | times | figures | answers | {"memory_bytes": 1} | more


def result(cases: list[dict[str, Any]], ratios: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "suite": "quick", "seed": "0", "commit": "abc", "rounds": 2, "date": "a day", "stubbed": "attention",
        "machine": {"cpu": "one", "cores": 2, "memory_bytes": 1 << 30, "kernel": "6"}, "versions": {"engine": "vllm 1"},
        "model": {"kv_bytes_per_token": 16384}, "links": {"1g": {"payload_bytes_s": 120e6}},
        "cases": cases, "ratios": ratios, "missing": {"nixl-push, 1g, 32768": "does not start\nwith a log"},
    }  # fmt: skip


def found(cases: list[dict[str, Any]], ratios: list[dict[str, Any]]) -> dict[str, Any]:
    return {one.goal.text: one for one in verdicts({"cases": cases, "ratios": ratios})}


def test_the_worst_case_decides() -> None:
    ratios = [
        ratio("throughput", 4.0),
        ratio("throughput", 2.5, tokens=65536),
        ratio("throughput", 9, tokens=8192),
    ]
    goal = found([], ratios)["1 Gb/s, 32K to 128K: throughput of ours-int4 over vLLM with NIXL"]
    assert goal.met is False and goal.worst is not None and goal.worst[1] == 2.5 and "65536" in goal.worst[0]
    assert [value for _, value in goal.found] == [4.0, 2.5], "8192 tokens are not among what was promised"


@pytest.mark.parametrize(("value", "met"), [(0.99, True), (1.0, True), (1.01, False)])
def test_less_is_better_of_times(value: float, met: bool) -> None:
    ratios = [ratio("ttft_p99", value), ratio("ttft_p99", 5.0, best=False, peer="mooncake")]
    assert found([], ratios)["ttft_p99 below the best peer's in every load: ours-int4"].met is met


def test_conversion_is_a_share_of_the_requests_time() -> None:
    goal = found([case()], [])["conversion's CPU seconds, of a request's time"]
    assert goal.worst is not None and goal.worst[1] == pytest.approx(0.1) and not goal.met


def test_what_was_not_measured_is_neither() -> None:
    assert {one.met for one in found([], []).values()} == {None}


def test_a_wrong_answer_is_a_miss() -> None:
    text = "requests of ours that failed or were wrong"
    assert found([case()], [])[text].met and not found([case(), case(wrong=1)], [])[text].met
    assert not found([case(failed=2)], [])[text].met


def test_a_report_names_each_miss_and_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "draw", lambda cases, folder: iter([("a picture", folder / "one.svg")]))
    ratios = [ratio("ttft_p50", 1.5), ratio("ttft_p99", 0.5)]
    (tmp_path / "ab-quick.json").write_text(
        json.dumps(result([case(cpu_s={"prefill": {}, "decode": {}})], ratios))
    )
    (tmp_path / "causes.yaml").write_text("")
    missed = "ttft_p50 below the best peer's in every load: ours-int4"
    with pytest.raises(
        ReportError, match=r"was missed \(1.5 in 1g, 32768 tokens, closed-4.* and has no cause"
    ):
        write_report(tmp_path, tmp_path / "report.md")
    (tmp_path / "causes.yaml").write_text(json.dumps({missed: "the engine's own steps"}))
    goals = write_report(tmp_path, tmp_path / "report.md")["goals"]
    assert goals[missed] is False and goals["ttft_p99 below the best peer's in every load: ours-int4"] is True
    text = (tmp_path / "report.md").read_text()
    assert "**Stubbed: attention.**" in text.splitlines()[2]
    (row,) = (line for line in text.splitlines() if missed in line)
    assert "**missed** in 1 of 1" in row and row.endswith("| the engine's own steps |")
    assert "Left out: nixl-push, 1g, 32768: does not start" in text and "with a log" not in text
    assert "ttft_p50 of ours-int4 is 1.50 of nixl-pull's (1.40 to 1.60, sure)" in text
    assert "![a picture](images/ab-quick/one.svg)" in text


def test_a_folder_without_a_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="make one with"):
        write_report(tmp_path, tmp_path / "report.md")
