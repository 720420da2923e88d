# SPDX-License-Identifier: Apache-2.0
"""How many lines of the package the tests ran, in Python (SlipCover, read by coverage.py) and in C++ (gcov, by gcovr).

    make coverage ARGS="[--least N] [--json]"     what was counted since --reset, by make test or a part of it
    python -m scripts.coverage_table --reset      forget it

Tests count in the environments of ``scripts/environment.py --measured``: each process of theirs, servers and what
those start included. A file that nothing imported counts as not run. ``--least N`` adds the N files with the most lines
that did not run. Status 1 where a language is below ``fail_under`` of pyproject.toml, 2 where nothing was counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from coverage import Coverage
from coverage.exceptions import CoverageWarning, NoDataError

from scripts.environment import COUNTED, MEASURED, ROOT

#: Rooms of the package, and where its C++ lies; how deep a part of the table is.
PYTHON = {"sage_kv_connector": 2, "vendors": 1, "kernels": 1}
CPP = {"sage_kv_connector/csrc": 3, "kernels/cpu": 2}


class Lines(NamedTuple):
    """Those that could run, and those that did."""

    lines: int = 0
    covered: int = 0

    def __add__(self, other: object) -> Lines:
        if not isinstance(other, Lines):
            return NotImplemented
        return Lines(self.lines + other.lines, self.covered + other.covered)

    @property
    def percent(self) -> float:
        """Rounded down, so that no share reads as a floor that it does not reach."""
        return self.covered * 1000 // self.lines / 10 if self.lines else 100.0

    def row(self) -> dict[str, float]:
        return {**self._asdict(), "percent": self.percent}


#: By a file's path in the checkout.
Files = dict[str, Lines]


class Nothing(Exception):
    """Nothing was counted; the message says of what."""


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--json", action="store_true", help="one line of JSON on stdout")
    options.add_argument("--least", type=int, default=0, metavar="N", help="files with most lines not run")
    options.add_argument("--reset", action="store_true", help="forget what was counted")
    given = options.parse_args()
    if given.reset:
        reset(MEASURED)
        return 0
    try:
        floor, python = python_files()
        files = {"Python": python, "C++": cpp_files()}
    except Nothing as nothing:
        print(f"{nothing}: run make test first, or make test-unit MEASURED=--measured", file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps(result(files, floor)))
    else:
        print("\n".join(table(files, given.least)))
    below = [
        f"{name} {all_of(found).percent} %" for name, found in files.items() if not reaches(found, floor)
    ]
    if below:
        print(f"below {floor} % of lines (fail_under in pyproject.toml): {', '.join(below)}", file=sys.stderr)
    return 1 if below else 0


def reset(measured: Path) -> None:
    """Remove what processes have written; what they were built of stays."""
    for pattern in ("python/*", "**/*.gcda"):
        for path in measured.glob(pattern):
            path.unlink()


def python_files() -> tuple[float, Files]:
    """The floor, and every module of the package. Raises Nothing."""
    coverage = Coverage(data_file=str(COUNTED), config_file=str(ROOT / "pyproject.toml"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CoverageWarning)  # half a file of a process that was killed
            coverage.combine(strict=True, keep=True)
    except NoDataError as error:
        raise Nothing("no process counted lines of Python") from error
    found: Files = {}
    for room in PYTHON:
        for path in sorted((ROOT / room).rglob("*.py")):
            _, statements, _, missing, _ = coverage.analysis2(str(path))
            found[str(path.relative_to(ROOT))] = Lines(len(statements), len(statements) - len(missing))
    floor = coverage.get_option("report:fail_under")
    assert isinstance(floor, int | float)
    return floor, found


def cpp_files() -> Files:
    """Every source and header of the data plane. Raises Nothing."""
    if next(MEASURED.rglob("*.gcda"), None) is None:
        raise Nothing("no process counted lines of C++")
    words = [
        sys.executable,
        "-m",
        "gcovr",
        "--root",
        str(ROOT),
        "--json-summary",
        "-",
        "--merge-lines",
        # gcov derives some counts from others; those of a process that was killed in between don't add up.
        "--gcov-ignore-parse-errors=negative_hits.warn_once_per_file",
        "-j",
        "2",
    ]
    words += [word for folder in CPP for word in ("--filter", f"{ROOT / folder}/")]
    done = subprocess.run([*words, str(MEASURED)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    summary = json.loads(done.stdout)
    return {file["filename"]: Lines(file["line_total"], file["line_covered"]) for file in summary["files"]}


def part_of(path: str) -> str:
    """The row that a file counts for: a room, or a folder of the C++."""
    folders = {**PYTHON, **CPP}
    depth = next(folders[folder] for folder in (*CPP, *PYTHON) if path.startswith(f"{folder}/"))
    return "/".join(path.split("/")[:-1][:depth])


def parts_of(files: Files) -> Files:
    parts: dict[str, Lines] = defaultdict(Lines)
    for path, lines in files.items():
        parts[part_of(path)] += lines
    return dict(sorted(parts.items()))


def all_of(files: Files) -> Lines:
    return sum(files.values(), Lines())


def reaches(files: Files, floor: float) -> bool:
    lines, covered = all_of(files)
    return covered * 100 >= floor * lines


def result(files: Mapping[str, Files], floor: float) -> dict[str, object]:
    """For a machine."""
    languages = {
        name: {
            **all_of(found).row(),
            "parts": {part: lines.row() for part, lines in parts_of(found).items()},
            "files": {path: lines.row() for path, lines in sorted(found.items())},
        }
        for name, found in files.items()
    }
    return {"floor": floor, "languages": languages}


def table(files: Mapping[str, Files], least: int) -> list[str]:
    rows = [f"{'lines that tests ran':52} {'lines':>7} {'covered':>8} {'percent':>8}"]

    def add(name: str, lines: Lines) -> None:
        rows.append(f"{name:52} {lines.lines:7} {lines.covered:8} {lines.percent:8.1f}")

    for language, found in files.items():
        for part, lines in parts_of(found).items():
            add(f"{language:7} {part}", lines)
        add(f"{language:7} all", all_of(found))
    if least:
        together = [item for found in files.values() for item in found.items()]
        rows.append("most lines that did not run:")
        for path, lines in sorted(together, key=lambda item: item[1].covered - item[1].lines)[:least]:
            add(path, lines)
    return rows


if __name__ == "__main__":
    sys.exit(main())
