# SPDX-License-Identifier: Apache-2.0
"""docs/performance.md: each section's commands, table and goals, written between its marks from its JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from sage_kv_connector.bench.goal import Row, Verdict
from sage_kv_connector.bench.marked import begin, written
from sage_kv_connector.bench.performance.sections import SECTIONS, Section, shown
from sage_kv_connector.bench.provenance import machine_text


def kept(results: Path, name: str) -> Path:
    """The file of a section's JSON: ``runs`` (``command`` and ``result``), ``commit``, ``date``, ``machine``."""
    return results / f"performance-{name}.json"


def with_figures(text: str, results: Path, causes: Mapping[str, str]) -> str:
    """The page with all sections written anew. Raises NoCause."""
    for name, section in SECTIONS.items():
        text = written(text, begin(name), _lines(section, kept(results, name), causes))
    return text


def _lines(section: Section, path: Path, causes: Mapping[str, str]) -> Iterator[str]:
    if not path.exists():
        yield "**Not measured.** By:"
        yield from _commands(section.commands)
        return
    measured = json.loads(path.read_text())
    found = [run["result"] for run in measured["runs"]]
    where = machine_text(measured["machine"])
    yield f"Of {measured['date'][:10]}, commit {measured['commit']}; {where}. By:"
    yield from _commands([run["command"] for run in measured["runs"]])
    yield from section.table(found)
    yield ""
    yield from _goals(section, {"results": found}, causes)


def _commands(commands: Iterable[str]) -> Iterator[str]:
    yield ""
    yield "```bash"
    yield from map(shown, commands)
    yield "```"
    yield ""


def _goals(section: Section, found: Row, causes: Mapping[str, str]) -> Iterator[str]:
    for goal in section.goals:
        verdict = Verdict(goal, list(goal.figures(found)))
        if verdict.worst is None:
            yield f"* {goal.text}: goal {verdict.bound}, not measured."
            continue
        where, figure = verdict.worst
        cause = verdict.cause(causes)
        yield (
            f"* {goal.text}: goal {verdict.bound}, {verdict.said()}; worst {figure:.3g} ({where})."
            + (f" {cause}" if cause else "")
        )
    if section.goals:
        yield ""
