# SPDX-License-Identifier: Apache-2.0
"""What was promised of a figure, and what was measured of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
#: Cases and their figures.
Found = Iterator[tuple[str, float]]


class NoCause(ValueError):
    """A goal was missed and nothing says why."""


@dataclass(frozen=True)
class Goal:
    """``figures``: of all results, the case of each and its figure. The figure must be at least or at most ``bound``.

    Results: ``cases`` and ``ratios`` of comparisons, ``stable`` runs, ``formats`` of accuracy; of a section of
    docs/performance.md its commands' ``results``.
    """

    text: str
    figures: Callable[[Row], Found]
    bound: float
    at_least: bool

    def met(self, figure: float) -> bool:
        return figure >= self.bound if self.at_least else figure <= self.bound


@dataclass(frozen=True)
class Verdict:
    """``worst``: of all ``found`` the figure that is least as promised; none where nothing was measured."""

    goal: Goal
    found: Sequence[tuple[str, float]]

    @property
    def worst(self) -> tuple[str, float] | None:
        by = min if self.goal.at_least else max
        return by(self.found, key=lambda one: one[1]) if self.found else None

    @property
    def met(self) -> bool | None:
        return None if self.worst is None else self.goal.met(self.worst[1])

    @property
    def bound(self) -> str:
        return f"{'≥' if self.goal.at_least else '≤'} {self.goal.bound:g}"

    def said(self) -> str:
        """Met, or in how many cases it was missed."""
        missed = sum(not self.goal.met(figure) for _, figure in self.found)
        return "met" if self.met else f"**missed** in {missed} of {len(self.found)}"

    def cause(self, causes: Mapping[str, str]) -> str:
        """Of a miss, by the goal's text; "" where it was met. Raises NoCause."""
        if self.met or self.worst is None:
            return ""
        if not causes.get(self.goal.text):
            where, figure = self.worst
            raise NoCause(f"{self.goal.text!r} was missed ({figure:.3g} in {where}) and has no cause")
        return causes[self.goal.text]
