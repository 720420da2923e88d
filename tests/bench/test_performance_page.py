# SPDX-License-Identifier: Apache-2.0
"""docs/performance.md: its tables are those of the JSON in docs/results, and say what was missed, and why."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from sage_kv_connector.bench.goal import Goal, NoCause
from sage_kv_connector.bench.marked import END, begin, table
from sage_kv_connector.bench.performance import page
from sage_kv_connector.bench.performance.sections import BENCH, SECTIONS, Section
from sage_kv_connector.bench.performance.table import Results
from sage_kv_connector.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"


def test_the_page_is_that_of_the_results() -> None:
    text = (ROOT / "docs" / "performance.md").read_text()
    causes = yaml.safe_load((RESULTS / "causes.yaml").read_text())
    assert page.with_figures(text, RESULTS, causes) == text, "make report"


def test_the_page_has_a_place_for_every_section_and_no_other() -> None:
    text = (ROOT / "docs" / "performance.md").read_text()
    assert sorted(re.findall("<!-- bench report writes (.*) -->", text)) == sorted(SECTIONS)
    assert text.count(END) == len(SECTIONS)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_sections_commands_exist(name: str) -> None:
    for command in SECTIONS[name].commands:
        program, *words = command.split()
        if not command.startswith(BENCH):
            assert (ROOT / f"{program.replace('.', '/')}.py").exists()
            continue
        bench = get_command(app).commands["bench"]  # type: ignore[attr-defined]
        bench.commands[words[0]].make_context(words[0], words[1:])


def _section(figures: dict[str, float], bound: float) -> Section:
    def rows(results: Results) -> Iterator[str]:
        yield from table(["case", "figure"], ([name, str(of)] for one in results for name, of in one.items()))

    goal = Goal("speed", lambda found: iter(found["results"][0].items()), bound, True)
    return Section(("bench transfer --repeats 1", "scripts.other"), rows, (goal,))


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def keep(figures: dict[str, float], bound: float) -> Path:
        monkeypatch.setattr(page, "SECTIONS", {"one": _section(figures, bound)})
        machine = {"cpu": "a CPU", "cores": 2, "memory_bytes": 24 << 30, "kernel": "6"}
        runs = [{"command": "bench transfer --repeats 1", "result": figures}]
        about = {"runs": runs, "date": "2026-11-30T01:02:03", "commit": "abc", "machine": machine}
        page.kept(tmp_path, "one").write_text(json.dumps(about))
        return tmp_path

    return keep


TEXT = f"before\n{begin('one')}\nold\n{END}\nafter\n"


def test_a_section_names_its_command_machine_and_day_and_what_was_met(kept: Any) -> None:
    text = page.with_figures(TEXT, kept({"a": 0.9, "b": 1.5}, 0.9), {})
    assert text.startswith(
        f"before\n{begin('one')}\nOf 2026-11-30, commit abc; 2 cores of a CPU, 24 GiB, Linux 6. By:"
    )
    assert 'make bench ARGS="transfer --repeats 1 --json"' in text and "old" not in text
    assert "| a | 0.9 |" in text and "* speed: goal ≥ 0.9, met; worst 0.9 (a)." in text
    assert text.endswith(f"{END}\nafter\n")


def test_a_miss_has_its_cause_or_there_is_no_page(kept: Any) -> None:
    results = kept({"a": 0.9, "b": 0.5}, 0.8)
    with pytest.raises(NoCause, match=r"'speed' was missed \(0.5 in b\) and has no cause"):
        page.with_figures(TEXT, results, {})
    text = page.with_figures(TEXT, results, {"speed": "It is slow."})
    assert "* speed: goal ≥ 0.8, **missed** in 1 of 2; worst 0.5 (b). It is slow." in text


def test_what_was_not_measured_says_how_it_would_be(tmp_path: Path, kept: Any) -> None:
    page.kept(kept({}, 1.0), "one").unlink()
    text = page.with_figures(TEXT, tmp_path, {})
    assert "**Not measured.** By:" in text
    assert 'make bench ARGS="transfer --repeats 1 --json"' in text
    assert 'make shell ARGS="python -m scripts.other --json"' in text
