# SPDX-License-Identifier: Apache-2.0
"""Pictures as SVG: bars by arm and load, one for each link and length of prompts. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Row = dict[str, Any]

#: Figure of a case, its title, and what it is multiplied by.
PANELS = (
    ("throughput", "tokens of prompts a second", 1.0),
    ("ttft_p50_s", "time to first token, median, s", 1.0),
    ("ttft_p99_s", "time to first token, p99, s", 1.0),
    ("utilization", "bytes on the link, of iperf3's", 1.0),
)
#: Colours that differ in lightness too; ours are blues, the peers' warm, none is grey.
COLOURS = {
    "ours-bf16": "#08306b",
    "ours-fp8": "#2171b5",
    "ours-int4": "#6baed6",
    "ours-nixl": "#08519c",
    "ours-mooncake": "#9ecae1",
    "nixl-pull": "#a63603",
    "nixl-push": "#e6550d",
    "mooncake": "#fdae6b",
    "alone": "#969696",
}


def draw(cases: Sequence[Row], folder: Path) -> Iterator[tuple[str, Path]]:
    """Bars; writes the pictures, yields the title and file of each. Raises ImportError without matplotlib."""
    groups = dict.fromkeys((case["link"], case["tokens"], case["dispatch"]) for case in cases)
    for link, tokens, dispatch in groups:
        of = [
            case
            for case in cases
            if (case["link"], case["tokens"], case["dispatch"]) == (link, tokens, dispatch)
        ]
        path = folder / f"ab-{link}-{tokens}-{dispatch}.svg"
        _bars(of, path)
        yield f"{link}, {tokens} tokens, {dispatch}", path


@contextmanager
def picture(path: Path, titles: Sequence[str]) -> Iterator[tuple[Any, Any]]:
    """A figure of as many axes beside each other, written at the end. Equal figures make equal files.

    Raises ImportError without matplotlib.
    """
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(
        {"svg.hashsalt": "sage-kvt", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure, axes = plt.subplots(1, len(titles), figsize=(3.4 * len(titles), 3.2), squeeze=False)
        for axis, title in zip(axes[0], titles, strict=True):
            axis.set_title(title, fontsize=9)
        yield figure, axes[0]
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def legend_below(figure: Any, axes: Any) -> None:
    """What the first axes drew, in one row under all of them."""
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=max(1, len(labels)), frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))


def _bars(cases: Sequence[Row], path: Path) -> None:
    panels = [panel for panel in PANELS if any(case[panel[0]] is not None for case in cases)]
    loads = list(dict.fromkeys(case["load"] for case in cases))
    arms = [arm for arm in COLOURS if any(case["arm"] == arm for case in cases)]
    with picture(path, [title for _, title, _ in panels]) as (figure, axes):
        width = 0.8 / len(arms)
        for axis, (key, _, scale) in zip(axes, panels, strict=True):
            for number, arm in enumerate(arms):
                found = {case["load"]: case[key] for case in cases if case["arm"] == arm}
                heights = [(found.get(load) or 0.0) * scale for load in loads]
                places = [place + (number - (len(arms) - 1) / 2) * width for place in range(len(loads))]
                axis.bar(places, heights, width, color=COLOURS[arm], label=arm)
            axis.set_xticks(range(len(loads)), loads)
        legend_below(figure, axes)
