# SPDX-License-Identifier: Apache-2.0
"""Change the engine in one place at a time, and see whether the simulation or the unit tests notice.

    python -m scripts.mutate [--mutants 200] [--seed 0] [--jobs N] [--only TEXT] [--again FILE] [--json]

Mutants of ``engine/`` and ``contract/``, as they were committed: a comparison, an operator, a condition, a call that is
dropped, a value that is not returned. Each meets the unit tests that reach its line, those that do little else first,
then some schedules of the simulation. What survives all is printed, for a person to judge. Status 1 below 95 %.
``--again``: only those that a run before, whose JSON this file has, let survive; lines may have moved.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from coverage import CoverageData

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sage_kv_connector"
ROOMS = ("engine", "contract")
SCHEDULES = 1500
#: Of both rooms, and of who uses them.
TESTS = (
    "tests/engine",
    "tests/contract",
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
    """``lines``: from its statement's first to its own. ``before`` and ``after``: source of what was changed."""

    path: Path
    lines: range
    kind: str
    before: str
    after: str
    source: str

    @property
    def name(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.lines[-1]} {self.kind}: {self.before!r} → {self.after!r}"


def mutants_of(path: Path) -> Iterator[Mutant]:
    """All of one module."""
    source = path.read_text()
    tree = ast.parse(source)
    statement = _statements(tree)
    typed = {id(child) for node in ast.walk(tree) for child in _annotations(node)}
    for node in ast.walk(tree):
        if id(node) in typed or not hasattr(node, "lineno"):
            continue
        for kind, changed in _changes(node):
            before, after = ast.get_source_segment(source, node) or "", ast.unparse(changed)
            lines = range(statement[id(node)], node.lineno + 1)
            yield Mutant(path, lines, kind, before, after, _replaced(source, node, after))


def _statements(tree: ast.Module) -> dict[int, int]:
    """Of each node, by ``id``: the first line of the statement that it is or is in."""
    found: dict[int, int] = {}

    def walk(node: ast.AST, line: int) -> None:
        found[id(node)] = line
        for child in ast.iter_child_nodes(node):
            walk(child, child.lineno if isinstance(child, ast.stmt) else line)

    walk(tree, 1)
    return found


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
    indent = " " * node.col_offset if isinstance(node, ast.stmt) else ""
    text = f"({after})" if isinstance(node, ast.expr) else after.replace("\n", f"\n{indent}")
    return "".join([*lines[:start], first, text, last, *lines[end + 1 :]])


class Reach:
    """Which tests reach a line; from a run under coverage."""

    def __init__(self, folder: Path, measured: Path) -> None:
        data = CoverageData(str(measured))
        data.read()
        self._of = {
            Path(name).relative_to(folder): data.contexts_by_lineno(name) for name in data.measured_files()
        }
        tests = [test for lines in self._of.values() for reached in lines.values() for test in set(reached)]
        self._breadth = Counter(map(_test_id, tests))

    def tests(self, mutant: Mutant) -> list[str]:
        """Those that do least besides come first; empty for a line that is run at import only."""
        lines = self._of.get(mutant.path.relative_to(ROOT), {})
        reached = {_test_id(one) for line in mutant.lines for one in lines.get(line, [])} - {""}
        return sorted(reached, key=lambda test: self._breadth[test])


def _test_id(context: str) -> str:
    """Without what says whether it was its setup or itself."""
    return context.rpartition("|")[0]


class Copy:
    """A clone of the last commit with an environment of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
        if not self._passes(
            ["scripts.simulate", "--schedules", "100", "--jobs", "1", "--stop"], LONGEST_S * 3
        ):
            raise RuntimeError(f"{folder}: the simulation does not pass without any change")

    def reach(self) -> Reach:
        """Of all tests that a mutant meets; takes some minutes."""
        measure = [f"--cov=sage_kv_connector/{room}" for room in ROOMS]
        if not self._passes(
            [*PYTEST, *measure, "--cov-context=test", "--cov-report=", *TESTS], LONGEST_S * 6
        ):
            raise RuntimeError(f"{self.folder}: the tests do not pass without any change")
        return Reach(self.folder, self.folder / ".coverage")

    def killed_by(self, mutant: Mutant, tests: list[str]) -> str:
        """What noticed it; "" if nothing did."""
        target = self.folder / mutant.path.relative_to(ROOT)
        whole = target.read_text()
        target.write_text(mutant.source)
        chosen = self.folder / "chosen_tests"
        chosen.write_text("\n".join(tests or TESTS))
        try:
            if not self._passes([*PYTEST, f"@{chosen}"], LONGEST_S):
                return "tests"
            simulate = ["scripts.simulate", "--schedules", str(SCHEDULES), "--jobs", "1", "--stop"]
            return "" if self._passes(simulate, LONGEST_S) else "simulation"
        finally:
            target.write_text(whole)

    def _passes(self, words: list[str], limit_s: float) -> bool:
        # The environment is made by the Python below ours, not by a virtual one.
        python = getattr(sys, "_base_executable", sys.executable)
        prefix = [python, "scripts/environment.py", "--mutation", "python", "-m"]
        out = subprocess.DEVNULL
        with subprocess.Popen(
            [*prefix, *words], cwd=self.folder, stdout=out, stderr=out, start_new_session=True
        ) as process:
            try:
                return process.wait(limit_s) == 0
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return False


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
        copies = list(pool.map(Copy, [Path(folder) / str(i) for i in range(given.jobs)]))
        reach = copies[0].reach()
        free: SimpleQueue[Copy] = SimpleQueue()
        for copy in copies:
            free.put(copy)

        def judge(mutant: Mutant) -> str:
            copy = free.get()
            try:
                return copy.killed_by(mutant, reach.tests(mutant))
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
