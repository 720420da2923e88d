# SPDX-License-Identifier: Apache-2.0
"""Change the engine in one place at a time, and see whether the simulation or the unit tests notice.

    python -m scripts.mutate [--mutants 200] [--seed 0] [--jobs N] [--only TEXT] [--again FILE] [--json]

Mutants of ``engine/`` and ``contract/``, as they were committed: a comparison, an operator, a condition, a call that is
dropped, a value that is not returned. Each meets the unit tests that import its module first, then some schedules of
the simulation, the unit tests of both rooms, and those of who uses them. What survives all is printed, for a person to
judge. Status 1 below 95 %.
``--again``: only those that a run before, whose JSON this file has, let survive; lines may have moved.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sage_kv_connector"
ROOMS = ("engine", "contract")
SCHEDULES = 1500
TESTS = ("tests/engine", "tests/contract")
USERS = (
    "tests/integrations",
    "tests/format",
    "tests/kernels/test_cpu_kernels.py",
    "tests/sage",
    "tests/config",
    "tests/test_bench_control.py",
)
PYTEST = ("pytest", "-q", "-x", "-p", "no:cacheprovider")
#: A mutant that takes longer hangs, which is noticed.
LONGEST_S = 180.0
WANTED = 0.95

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
    ast.Mod: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip
#: Calls without an effect that a test could see.
_TALK = ("logger", "logging", "warnings")


class Mutant(NamedTuple):
    """``before`` and ``after``: source of what was changed."""

    path: Path
    line: int
    kind: str
    before: str
    after: str
    source: str

    @property
    def name(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} {self.kind}: {self.before!r} → {self.after!r}"


def mutants_of(path: Path) -> Iterator[Mutant]:
    """All of one module."""
    source = path.read_text()
    tree = ast.parse(source)
    typed = {id(child) for node in ast.walk(tree) for child in _annotations(node)}
    for node in ast.walk(tree):
        if id(node) in typed or not hasattr(node, "lineno"):
            continue
        for kind, changed in _changes(node):
            before, after = ast.get_source_segment(source, node) or "", ast.unparse(changed)
            yield Mutant(path, node.lineno, kind, before, after, _replaced(source, node, after))


def _annotations(node: ast.AST) -> Iterator[ast.AST]:
    for name in ("annotation", "returns"):
        if isinstance(of := getattr(node, name, None), ast.AST):
            yield from ast.walk(of)
    # Types in the names of a module, such as ``OnOutcome = Callable[...]``.
    if isinstance(node, ast.Module):
        for statement in node.body:
            if not isinstance(statement, ast.FunctionDef | ast.ClassDef):
                yield from ast.walk(statement)


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARISONS:
        changed = ast.Compare(node.left, [_COMPARISONS[type(node.ops[0])](), *node.ops[1:]], node.comparators)
        yield "comparison", changed
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        yield "operator", ast.BinOp(node.left, _OPERATORS[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield "condition", ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "condition", node.operand
    elif isinstance(node, ast.If):
        negated = ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
        yield "condition", negated
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        words = ast.unparse(node.value.func)
        if not words.startswith(_TALK):
            yield "dropped call", ast.Pass()
    elif isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
        yield "return", ast.Return(ast.Constant(None))


def _replaced(source: str, node: ast.AST, after: str) -> str:
    lines = source.splitlines(keepends=True)
    start, end = node.lineno - 1, node.end_lineno - 1  # type: ignore[attr-defined]
    first = lines[start].encode()[: node.col_offset].decode()  # type: ignore[attr-defined]
    last = lines[end].encode()[node.end_col_offset :].decode()  # type: ignore[attr-defined]
    indent = " " * node.col_offset if isinstance(node, ast.stmt) else ""  # type: ignore[attr-defined]
    text = f"({after})" if isinstance(node, ast.expr) else after.replace("\n", f"\n{indent}")
    return "".join([*lines[:start], first, text, last, *lines[end + 1 :]])


class Copy:
    """A clone of the last commit with an environment of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
        if not self._passes(["scripts.simulate", "--schedules", "100", "--jobs", "1", "--stop"]):
            raise RuntimeError(f"{folder}: the simulation does not pass without any change")

    def killed_by(self, mutant: Mutant) -> str:
        """What noticed it; "" if nothing did."""
        target = self.folder / mutant.path.relative_to(ROOT)
        whole = target.read_text()
        target.write_text(mutant.source)
        try:
            near = self._tests_near(mutant.path)
            if near and not self._passes([*PYTEST, *near]):
                return "tests"
            simulate = ["scripts.simulate", "--schedules", str(SCHEDULES), "--jobs", "1", "--stop"]
            if not self._passes(simulate):
                return "simulation"
            for tests in (TESTS, USERS):
                if not self._passes([*PYTEST, *tests]):
                    return "tests"
            return ""
        finally:
            target.write_text(whole)

    def _tests_near(self, module: Path) -> list[str]:
        """Files of tests that import a module; the most likely ones to notice."""
        dotted = ".".join(module.relative_to(ROOT).with_suffix("").parts)
        room, _, name = dotted.rpartition(".")
        said = (f"from {dotted} import", f"import {dotted}", f"from {room} import {name}")
        files = [path for folder in TESTS for path in (self.folder / folder).glob("test_*.py")]
        return [
            str(path.relative_to(self.folder))
            for path in sorted(files)
            if any(words in path.read_text() for words in said)
        ]

    def _passes(self, words: list[str]) -> bool:
        # The environment is made by the Python below ours, not by a virtual one.
        python = getattr(sys, "_base_executable", sys.executable)
        prefix = [python, "scripts/environment.py", "python", "-m"]
        out = subprocess.DEVNULL
        try:
            done = subprocess.run(
                [*prefix, *words],
                cwd=self.folder,
                timeout=LONGEST_S,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0


def _anywhere(name: str) -> str:
    """A mutant's name without its line."""
    place, _, change = name.partition(" ")
    return f"{place.partition(':')[0]} {change}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--mutants", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", default="", metavar="TEXT", help="modules whose path contains this")
    parser.add_argument("--again", type=Path, metavar="FILE", help="those that survived another run")
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    given = parser.parse_args()
    paths = sorted(p for room in ROOMS for p in (PACKAGE / room).rglob("*.py") if given.only in str(p))
    found = [mutant for path in paths for mutant in mutants_of(path)]
    if given.again is not None:
        before = {_anywhere(name) for name in json.loads(given.again.read_text())["survivors"]}
        chosen = [mutant for mutant in found if _anywhere(mutant.name) in before]
    else:
        chosen = random.Random(given.seed).sample(found, min(given.mutants, len(found)))
    began, noticed, survivors = time.monotonic(), {"simulation": 0, "tests": 0}, []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.jobs) as pool:
        free: SimpleQueue[Copy] = SimpleQueue()
        for i in range(given.jobs):
            free.put(Copy(Path(folder) / str(i)))

        def judge(mutant: Mutant) -> str:
            copy = free.get()
            try:
                return copy.killed_by(mutant)
            finally:
                free.put(copy)

        judged = {pool.submit(judge, mutant): mutant for mutant in chosen}
        for number, future in enumerate(as_completed(judged), 1):
            mutant, by = judged[future], future.result()
            if by:
                noticed[by] += 1
            else:
                survivors.append(mutant.name)
            left = (len(chosen) - number) * (time.monotonic() - began) / number
            print(
                f"{number}/{len(chosen)} {by or 'SURVIVED'}: {mutant.name[:160]} ({left:.0f} s left)",
                file=sys.stderr,
            )
    share = 1 - len(survivors) / len(chosen)
    result = {
        "mutants": len(chosen),
        "of": len(found),
        **noticed,
        "survivors": survivors,
        "killed": round(share, 3),
    }
    print(
        json.dumps(result) if given.json else "\n".join(f"{name}: {value}" for name, value in result.items())
    )
    return 0 if share >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
