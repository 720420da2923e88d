# SPDX-License-Identifier: Apache-2.0
"""What a run has done so far, in a file from which it goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from sage_kv_connector.bench.ab.suites import Case

#: What one arm did of one case in one round: the case's fields, ``arm``, ``round``, ``done`` and ``spent``.
Turn = dict[str, Any]


class Kept:
    """JSON lines; the first says what run it is. Without a path nothing is written.

    Raises ValueError where the file keeps another run.
    """

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self._path = path
        self.turns: list[Turn] = []
        #: By name: what one plain stream got, as measured last.
        self.links: dict[str, dict[str, float]] = {}
        if path is None:
            return
        if not path.exists() or not path.stat().st_size:
            path.write_text(json.dumps(about) + "\n")
            return
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]  # a line that was cut off when a run was stopped is none
        if whole != text:
            path.write_text(whole)
        first, *lines = whole.splitlines()
        if json.loads(first) != about:
            raise ValueError(
                f"{path} keeps {first}, not {json.dumps(about)}: name another file, or remove it"
            )
        for line in lines:
            self._take(json.loads(line))

    def add_turn(self, case: Case, arm: str, number: int, figures: dict[str, Any]) -> None:
        self._add({**case._asdict(), "arm": arm, "round": number, **figures})

    def add_link(self, name: str, measured: dict[str, float]) -> None:
        self._add({"link": name, "measured": measured})

    def has(self, case: Case, arm: str, number: int) -> bool:
        wanted = {**case._asdict(), "arm": arm, "round": number}
        return any(all(turn[key] == value for key, value in wanted.items()) for turn in self.turns)

    def _add(self, one: dict[str, Any]) -> None:
        self._take(one)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(one) + "\n")

    def _take(self, one: dict[str, Any]) -> None:
        if "measured" in one:
            self.links[one["link"]] = one["measured"]
        else:
            self.turns.append(one)


class Left:
    """Turns that are left, and about how long they take: as long as those before, on average."""

    def __init__(self, turns: int) -> None:
        self._left, self._done, self._begun = turns, 0, time.monotonic()

    def after(self, turns: int = 1) -> str:
        self._left, self._done = self._left - turns, self._done + turns
        seconds = (time.monotonic() - self._begun) / self._done * self._left
        return f"{self._left} turns left, about {seconds / 60:.0f} min"
