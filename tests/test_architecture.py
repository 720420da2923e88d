# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: the seven rules of docs/design.md, over every import of the package.

Lazy imports, imports for types only and ``import_module`` count like any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "sage_kv_connector"
#: Rooms that stand beside the package in the repository and inside it when it is installed.
BESIDE = ("vendors", "kernels")
#: What any room above them may stand on.
BASE = ("contract", "devices", "backends", "config", "format", "telemetry.recording", "_data_plane")
#: Whoever stands on the engine comes in by its door.
DOOR = "engine!"


class Import(NamedTuple):
    """Both by their place in the package, such as ``engine.core``."""

    module: str
    imported: str


@cache
def modules() -> dict[str, Path]:
    """Every module of the package, by its place in it."""
    found = {}
    for folder, prefix in ((ROOT / PACKAGE, ""), *((ROOT / name, f"{name}.") for name in BESIDE)):
        for path in folder.rglob("*.py"):
            parts = [part for part in path.relative_to(folder).with_suffix("").parts if part != "__init__"]
            found[f"{prefix}{'.'.join(parts)}".rstrip(".")] = path
    return found


def _named(text: str) -> Iterator[str]:
    if text == PACKAGE or text.startswith(f"{PACKAGE}."):
        yield text.removeprefix(PACKAGE).strip(".")


def _of_node(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield from _named(alias.name)
    elif isinstance(node, ast.ImportFrom) and node.module:
        for base in _named(node.module):
            for alias in node.names:
                inner = f"{base}.{alias.name}".strip(".")
                yield inner if inner in modules() or inner == "_data_plane" else base
    elif (
        isinstance(node, ast.Call)
        and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"
    ):
        text = node.args[0]
        if isinstance(text, ast.JoinedStr):
            text = text.values[0]
        if isinstance(text, ast.Constant):
            yield from _named(str(text.value))


@cache
def imports() -> tuple[Import, ...]:
    return tuple(
        Import(module, imported)
        for module, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        for imported in _of_node(node)
        if imported  # the package itself has only its version and lazy names
    )


def _in(module: str, room: str) -> bool:
    if room.endswith("!"):
        return module == room[:-1]
    return module == room or module.startswith(f"{room}.")


class Rule(NamedTuple):
    """Modules of ``room`` may import their own room and ``may``."""

    room: str
    may: tuple[str, ...] = ()

    def broken(self) -> list[str]:
        return [
            f"{one.module} imports {one.imported}"
            for one in imports()
            if _in(one.module, self.room)
            and not any(_in(one.imported, room) for room in (self.room, *self.may))
        ]


class OnlyFrom(NamedTuple):
    """Nothing but ``users`` and itself imports ``room``."""

    room: str
    users: tuple[str, ...]

    def broken(self) -> list[str]:
        return [
            f"{one.module} imports {one.imported}"
            for one in imports()
            if _in(one.imported, self.room)
            and not any(_in(one.module, user) for user in (self.room, *self.users))
        ]


LAYERS = ("control", "session", "pages", "conversion", "transfer", "routing", "observed", "core", "transport")
ROOF = ("cli", "bench", "demo", "doctor")

RULES: dict[str, tuple[Rule | OnlyFrom, ...]] = {
    "1 contract, devices and console stand on nothing of ours": (
        Rule("contract"),
        Rule("devices"),
        Rule("console"),
    ),
    "2 backends know devices only, formats the contract only, kernels formats only": (
        Rule("backends", ("devices", "_data_plane")),
        Rule("format", ("contract", "_data_plane")),
        Rule("kernels", ("format",)),
    ),
    "3 config knows the names of backends and dtypes, and no backend knows config": (
        Rule("config", ("backends!", "contract")),
    ),
    "4 a layer of the engine stands on those left of it": tuple(
        Rule(
            f"engine.{layer}",
            (
                *(f"engine.{lower}" for lower in LAYERS[:place]),
                *BASE,
                *(("kernels",) if layer == "conversion" else ()),
            ),
        )
        for place, layer in enumerate(LAYERS)
    ),
    "8 what is recorded stands below the engine, who reads it knows snapshots only": (
        Rule("telemetry.recording", ("contract",)),
        Rule("telemetry.reading", ("telemetry.recording", "contract", "config")),
    ),
    "5 probing < vendors < report, and few others open a vendor": (
        Rule("hardware.probing"),
        Rule("vendors", ("devices", "hardware.probing", "_data_plane")),
        Rule("hardware.report", ("hardware.probing", "vendors", "devices", "config", "backends")),
        OnlyFrom(
            "vendors",
            (
                "hardware.report",
                "integrations.common.accelerator",
                "cli",
                "bench",
                "doctor",
            ),
        ),
    ),
    "6 who stands on the engine comes in by the door, and engines' integrations don't know each other": (
        Rule("store", (DOOR, *BASE, "console")),
        Rule("integrations.common", (DOOR, *BASE, "hardware.report", "vendors")),
        Rule("integrations.vllm", (DOOR, *BASE, "integrations.common", "telemetry.reading")),
        Rule("integrations.sglang", (DOOR, *BASE, "integrations.common", "telemetry.reading", "store")),
        Rule(
            "integrations.sage",
            (
                DOOR,
                *BASE,
                "integrations.common",
                "integrations.vllm",
                "integrations.sglang",
                "hardware.probing",
                "telemetry.reading",
                "telemetry.reading",
            ),
        ),
    ),
    "7 nothing imports the roof, and launch is the roof's": (
        OnlyFrom("cli", ("doctor",)),
        OnlyFrom("bench", ROOF),
        OnlyFrom("demo", ROOF),
        OnlyFrom("doctor", ROOF),
        OnlyFrom("launch", ROOF),
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_imports_keep_the_rule(rule: str) -> None:
    assert [line for part in RULES[rule] for line in part.broken()] == []


def test_every_module_has_a_room() -> None:
    rooms: tuple[str, ...] = (
        "contract",
        "devices",
        "console",
        "backends",
        "format",
        "kernels",
        "config",
        "engine",
        "hardware",
        "telemetry",
    )
    rooms = (*rooms, "vendors", "store", "integrations", "launch", *ROOF)
    assert [name for name in modules() if name and not any(_in(name, room) for room in rooms)] == []


def test_files_fit_in_a_head() -> None:
    """Device kernels and generated files aside."""
    python = {name: path for name, path in modules().items() if path.exists()}
    long = [f"{name}: {n} lines" for name, path in python.items() if (n := _lines(path)) > 320]
    sources = [*(ROOT / PACKAGE / "csrc").rglob("*.[ch]*"), *(ROOT / "kernels" / "cpu").iterdir()]
    sources += [*(ROOT / "vendors").rglob("*.cc"), *(ROOT / "vendors").rglob("*.h")]
    long += [
        f"{path.relative_to(ROOT)}: {n} lines"
        for path in sources
        if path.is_file() and (n := _lines(path)) > 380
    ]
    assert long == []


def _lines(path: Path) -> int:
    return path.read_text().count("\n")
