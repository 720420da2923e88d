# SPDX-License-Identifier: Apache-2.0
"""The report's first table: what was promised against what was measured, and a cause for each miss."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from sage_kv_connector.bench.marked import END
from sage_kv_connector.bench.report import accuracy, plots, stability
from sage_kv_connector.bench.report.document import READMES, ReportError, write_report
from sage_kv_connector.bench.report.first_screen import BEGIN, with_table
from sage_kv_connector.bench.report.goals import verdicts
from sage_kv_connector.bench.report.stability import SLOPES

CASE = {"link": "1g", "tokens": 32768, "load": "closed-4", "dispatch": "sequential", "arm": "ours-int4"}


def ratio(what: str, value: float, **more: Any) -> dict[str, Any]:
    row = CASE | {"what": what, "peer": "nixl-pull", "best": True, "ratio": value}
    return row | {"interval": [value - 0.1, value + 0.1]} | more


def case(**more: Any) -> dict[str, Any]:
    times = dict.fromkeys(("ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "after_prefill_p50_s"), 2.0)
    cpu = {"prefill": {"engine": 1.0, "conversion": 0.1}, "decode": {"conversion": 0.1, "transport": 0.2}}
    figures = {
        "throughput": 9000.0,
        "tpot_s": 0.0,
        "utilization": 0.9,
        "busy_utilization": 0.97,
        "wire_bytes": 10,
        "cpu_s": cpu,
    }
    answers = {"failed": 0, "wrong": None, "judged": 4, "agreement": 0.5, "goodput": None, "requests": 4}
    return CASE | times | figures | answers | {"memory_bytes": 1} | more


def result(cases: list[dict[str, Any]], ratios: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "suite": "quick", "seed": "0", "commit": "abc", "rounds": 2, "date": "a day", "stubbed": "attention",
        "machine": {"cpu": "one", "cores": 2, "memory_bytes": 1 << 30, "kernel": "6"}, "versions": {"engine": "vllm 1"},
        "model": {"kv_bytes_per_token": 16384}, "links": {"1g": {"payload_bytes_s": 120e6}},
        "cases": cases, "ratios": ratios, "missing": {"nixl-push, 1g, 32768": "does not start\nwith a log"},
    }  # fmt: skip


def found(
    cases: list[dict[str, Any]], ratios: list[dict[str, Any]], stable: Any = (), formats: Any = ()
) -> dict[str, Any]:
    results = {"cases": cases, "ratios": ratios, "stable": stable, "formats": formats}
    return {one.goal.text: one for one in verdicts(results)}


def long_run(**more: Any) -> dict[str, Any]:
    slope = {"an_hour": 0.5, "interval": [-0.1, 1.1], "of_median": 0.25}
    row = {
        "minute": 1,
        "requests": 3,
        "ttft_p50_s": 2.0,
        "ttft_p99_s": 3.0,
        "memory_bytes": 1,
        "descriptors": 9,
        "machine_s": 0.003,
    }
    return {
        "arm": "ours-bf16", "link": "1g", "tokens": 32768, "seconds": 7200, "share": 0.8, "requests": 9, "failed": 0,
        "judged": 3, "wrong": 0, "saturation_requests_s": 0.2, "slopes": dict.fromkeys(SLOPES, slope), "rows": [row],
    } | more  # fmt: skip


def wire_format(**more: Any) -> dict[str, Any]:
    figure = {"value": 1.01, "interval": [1.0, 1.02]}
    return {
        "name": "int4", "model": "small", "bytes_ratio": 0.28, "loss": 0.02, "interval": [0.01, 0.03],
        "probability_loss": 0.0, "probability_interval": [0.0, 0.1], "perplexity_ratio": figure, "kl": figure,
        "same_next_token": 0.9, "tasks": {
            "one": {"items": 300, "bf16": 0.5, "score": 0.25, "mcnemar": 0.04},
            "two": {"items": 300, "bf16": 0.5, "score": 0.5, "mcnemar": 1.0},
        },
    } | more  # fmt: skip


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[MagicMock]]:
    """Pictures without matplotlib: what each was told, by file."""
    made: dict[str, list[MagicMock]] = {}

    @contextmanager
    def picture(path: Path, titles: Sequence[str]) -> Iterator[tuple[MagicMock, list[MagicMock]]]:
        made[path.name] = [MagicMock() for _ in titles]
        for axis in made[path.name]:
            axis.get_legend_handles_labels.return_value = ([], [])
        yield MagicMock(), made[path.name]

    for module in (plots, stability, accuracy):
        monkeypatch.setattr(module, "picture", picture)
    return made


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


@pytest.mark.parametrize(("low", "met"), [(-0.1, True), (0.019, True), (0.021, False)])
def test_what_surely_rises_is_a_miss(low: float, met: bool) -> None:
    """The slope's low end is a share of the median: here half of it."""
    slopes = {"memory_bytes": {"an_hour": 1.0, "interval": [low, 2.0], "of_median": 0.5}}
    text = "two hours at 80 % of saturation: memory surely rises, an hour"
    assert found([], [], [long_run(slopes=slopes)])[text].met is met


def test_minutes_are_not_two_hours() -> None:
    goal = found([], [], [long_run(seconds=600)])["two hours at 80 % of saturation: failed or wrong"]
    assert goal.met is None


def test_accuracy_is_judged_by_each_model() -> None:
    formats = [wire_format(), wire_format(model="other", loss=0.001)]
    formats.append(wire_format(model="a few items", loss=0.5, tasks={"one": {"items": 60}}))
    goal = found([], [], formats=formats)["accuracy: loss of int4 on the average of tasks"]
    assert (
        goal.met is False and goal.worst == ("small, interval 1.00% to 3.00%", 0.02) and len(goal.found) == 2
    )


def test_long_runs_and_accuracy_have_their_tables_and_pictures(
    tmp_path: Path, drawn: dict[str, list[MagicMock]]
) -> None:
    few = {"one": {"items": 75, "bf16": 0.4, "score": 0.0, "mcnemar": 0.001}}
    zeroed = wire_format(name="zeroed", tasks=few)
    measured = {
        "formats": [wire_format(loss=0.0)], "control": [zeroed], "void": {}, "date": "a day",
        "missing": {"an fp8 cache": "no AVX-512"}, "commit": "abc", "engine_dtype": "float32",
        "arguments": ["--json", "--formats", "bf16 to fp8 cache"],
    }  # fmt: skip
    for name, content in (
        ("ab-quick", result([case(cpu_s={"prefill": {}, "decode": {}})], [])),
        ("stable-32k", long_run()),
        ("accuracy", measured),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "causes.yaml").write_text("")
    write_report(tmp_path, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert (
        "| ours-bf16, 1g, 32768 tokens, 120 min | 80% of 0.200/s | 9 | 0 | 0 of 3 | +25.00% (-5.00% to +55.00%) |"
        in text
    )
    assert "![ours-bf16, 1g, 32768 tokens, 120 min](images/stable-32k.svg)" in text
    assert "| small | int4 | 0.280 | 0.00% (1.00% to 3.00%) |" in text
    assert "| small | one | 300 | 50.0% | 25.0% (0.04) | 0.0% of 75, bf16 40.0% (0.001) |" in text
    assert "| small | two | 300 | 50.0% | 50.0% | – |" in text
    assert "| small | control: zeroed |" in text and "Left out: an fp8 cache: no AVX-512" in text
    assert "make accuracy ARGS=\"--json --formats 'bf16 to fp8 cache'\" > docs/results/accuracy.json" in text
    stable = 'make bench ARGS="stable --arm ours-bf16 --link 1g --tokens 32768 --minutes 120 --share 0.8'
    assert f"{stable} --out docs/results/stable-32k.json" in text
    _, _, memory, _, machine = drawn["stable-32k.svg"]
    assert memory.plot.call_args.args == ([1], [2.0**-30]) and machine.plot.call_args.args == ([1], [3.0])
    assert drawn["accuracy.svg"][0].errorbar.call_args.args == ([0.28], [1.01])


def test_a_report_names_each_miss_and_its_cause(tmp_path: Path, drawn: dict[str, list[MagicMock]]) -> None:
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
    narrowed = (
        "--links 1g --tokens 32768 --loads closed-4 --dispatches sequential --arms ours-int4 --state ab.jsonl"
    )
    assert f"--suite quick --seed 0 --rounds 2 {narrowed} --out docs/results/ab-quick.json" in text
    assert "![1g, 32768 tokens, sequential](images/ab-quick/ab-1g-32768-sequential.svg)" in text
    assert [bar.args[1] for bar in drawn["ab-1g-32768-sequential.svg"][0].bar.call_args_list] == [[9000.0]]


def test_a_readmes_table_is_written_between_its_marks_only(
    tmp_path: Path, drawn: dict[str, list[MagicMock]]
) -> None:
    ratios = [
        ratio("throughput", 3.06),
        ratio("throughput", 2.0, arm="ours-bf16", load="rag", best=False),
        ratio("throughput", 7.0, peer="mooncake"),
        ratio("throughput", 8.0, tokens=8192),
        ratio("ttft_p50", 0.1),
    ]
    (tmp_path / "ab-quick.json").write_text(
        json.dumps(result([case(cpu_s={"prefill": {}, "decode": {}})], ratios))
    )
    (tmp_path / "causes.yaml").write_text("")
    marked = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    (tmp_path / "README.md").write_text(marked)
    (tmp_path / "README.zh.md").write_text("without marks\n")
    write_report(tmp_path, tmp_path / "docs" / "report.md")
    rows = "| 32K tokens, closed-4 |  |  | 3.1 × |\n| 32K tokens, rag | 2.0 × |  |  |"
    table = f"| | bf16 | fp8 | int4 |\n|---|---|---|---|\n{rows}"
    assert (tmp_path / "README.md").read_text() == f"before\n{BEGIN}\n{table}\n{END}\nafter\n"
    assert (tmp_path / "README.zh.md").read_text() == "without marks\n"


def test_the_readmes_tables_are_those_of_the_results() -> None:
    root = Path(__file__).resolve().parents[2]
    runs = [json.loads(path.read_text()) for path in sorted((root / "docs" / "results").glob("ab-*.json"))]
    ratios = [one for run in runs for one in run["ratios"]]
    for name in READMES:
        text = (root / name).read_text()
        assert BEGIN in text and with_table(text, ratios) == text, "make report"


def test_a_folder_without_a_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="make one with"):
        write_report(tmp_path, tmp_path / "report.md")
