# SPDX-License-Identifier: Apache-2.0
"""A transfer's stages as a bar of letters, which say the same without colors."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from sage_kv_connector.contract.failure import printable

WIDTH = 16
#: The letter and the color of each stage.
STAGES = {
    "connect": ("c", "magenta"),
    "compute": ("p", "dim"),
    "hold": ("h", "dim"),
    "wait": (".", "dim"),
    "queue": ("q", "yellow"),
    "wire": ("=", "green"),
    "decode": ("d", "blue"),
    "report": ("r", "cyan"),
}
LEGEND = ", ".join(f"{letter} {stage}" for stage, (letter, _) in STAGES.items())


def stage_bar(stages: Sequence[tuple[str, float]], width: int = WIDTH) -> Text:
    """``width`` letters over all stages, each as many as it took of the time; "?" for a stage of a later release."""
    bar, end, drawn = Text(), 0.0, 0
    whole = sum(max(0.0, seconds) for _, seconds in stages)
    for stage, seconds in stages:
        end += max(0.0, seconds)
        upto = round(end / whole * width) if whole > 0 else 0
        letter, style = STAGES.get(stage, ("?", ""))
        bar.append(printable(letter) * (upto - drawn), style)
        drawn = upto
    return bar
