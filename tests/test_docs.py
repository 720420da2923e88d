# SPDX-License-Identifier: Apache-2.0
"""What the pages name exists: functions on a page's way, files that links lead to."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from scripts.troubleshooting_document import DOCUMENT, document

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sage_kv_connector"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
STEP = re.compile(r"^\| .* \| `([\w/]+\.(?:py|cc))` \| `([\w.:]+)` \|$", re.MULTILINE)


def steps() -> list[tuple[str, str]]:
    """(file, function) of each row of docs/a-page.md."""
    found: list[tuple[str, str]] = STEP.findall((ROOT / "docs" / "a-page.md").read_text())
    return found


def functions_of(path: Path) -> set[str]:
    """Names as ``function`` or ``Class.method``; of a C++ file as ``Class::method``."""
    text = path.read_text()
    if path.suffix == ".cc":
        return set(re.findall(r"^[\w:<>*& ]*?\b(\w+::\w+)\(", text, re.MULTILINE))
    found = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)
            }
    return found


def test_the_way_of_a_page_has_steps() -> None:
    assert len(steps()) > 40


@pytest.mark.parametrize(("file", "function"), steps())
def test_each_step_exists(file: str, function: str) -> None:
    assert function in functions_of(PACKAGE / file)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_troubleshooting_is_made_from_the_table() -> None:
    assert DOCUMENT.read_text() == document(), "run python -m scripts.troubleshooting_document"
