# SPDX-License-Identifier: Apache-2.0
"""What the report says of ``make accuracy``: bytes on the wire against what they cost, as a table and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sage_kv_connector.bench.marked import table
from sage_kv_connector.bench.report.plots import legend_below, picture

COLOURS = ("#08306b", "#a63603", "#2171b5", "#e6550d")
HEADS = (
    "model", "on the wire", "bytes", "loss on tasks", "of the right choice's probability", "perplexity ×", "KL, nats",
    "next token the same",
)  # fmt: skip
PANELS = ("KL of the next token, nats", "perplexity, times bf16's")
PICTURE = "accuracy.svg"


def accuracy(run: Mapping[str, Any], folder: Path, beside: Path) -> Iterator[str]:
    """Lines of the report; the picture goes into ``folder``, named from ``beside``."""
    yield "## Accuracy"
    yield ""
    yield "Real small models over running pairs, scored by what decode computes from KV that was handed over:"
    yield f"[accuracy](accuracy.md). {run['date']}, commit {run['commit'][:12]}, engine in {run['engine_dtype']}."
    yield ""
    yield from table(HEADS, (_cells(one, run["control"]) for one in (*run["formats"], *run["control"])))
    yield from _tasks([one for one in (*run["formats"], *run["control"]) if "tasks" in one])
    for name, why in (*run["missing"].items(), *run["void"].items()):
        yield ""
        yield f"Left out: {name}: {why}"
    single = [one for one in run["formats"] if "kl" in one]
    _curve(single, folder / PICTURE)
    yield ""
    yield f"![Bytes against loss]({(folder / PICTURE).relative_to(beside)})"


def _cells(one: Mapping[str, Any], controls: Sequence[Any]) -> Iterator[str]:
    yield one["model"]
    yield ("control: " if one in controls else "") + one["name"]
    yield f"{one['bytes_ratio']:.3f}" if "bytes_ratio" in one else "–"
    for value, interval in (("loss", "interval"), ("probability_loss", "probability_interval")):
        low, high = one[interval]
        yield f"{one[value]:.2%} ({low:.2%} to {high:.2%})"
    for figure, digits in (("perplexity_ratio", 4), ("kl", 5)):
        yield _figure(one[figure], digits) if figure in one else "–"
    yield f"{one['same_next_token']:.1%}" if "same_next_token" in one else "–"


def _tasks(single: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Scores by model and task: with bf16, and with each format; in brackets McNemar's p, where it is below 1.

    A control has fewer items, which are compared with bf16's of the same.
    """
    names = list(dict.fromkeys(one["name"] for one in single))
    yield ""
    yield f"| model | task | items | bf16 | {' | '.join(names)} |"
    yield f"|{'---|' * (len(names) + 4)}"
    for model in dict.fromkeys(one["model"] for one in single):
        of = {one["name"]: one["tasks"] for one in single if one["model"] == model}
        for task in dict.fromkeys(task for tasks in of.values() for task in tasks):
            found = {name: tasks[task] for name, tasks in of.items() if task in tasks}
            largest = max(found.values(), key=lambda each: int(each["items"]))
            cells = [_score(found.get(name), largest["items"]) for name in names]
            first = (model, task, str(largest["items"]), f"{largest['bf16']:.1%}")
            yield f"| {' | '.join((*first, *cells))} |"


def _score(of: Mapping[str, Any] | None, items: int) -> str:
    if of is None:
        return "–"
    said = f"{of['score']:.1%}"
    if of["items"] < items:
        said += f" of {of['items']}, bf16 {of['bf16']:.1%}"
    return said if of["mcnemar"] >= 1 else f"{said} ({of['mcnemar']:.2g})"


def _figure(of: Mapping[str, Any], digits: int) -> str:
    low, high = of["interval"]
    return f"{of['value']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _curve(formats: Sequence[Mapping[str, Any]], path: Path) -> None:
    models = list(dict.fromkeys(one["model"] for one in formats))
    with picture(path, PANELS) as (figure, axes):
        for axis, key in zip(axes, ("kl", "perplexity_ratio"), strict=True):
            for model, colour in zip(models, COLOURS, strict=False):
                of = [one for one in formats if one["model"] == model]
                xs, ys = [one["bytes_ratio"] for one in of], [one[key]["value"] for one in of]
                reach = [
                    [max(0.0, y - one[key]["interval"][0]) for y, one in zip(ys, of, strict=True)],
                    [max(0.0, one[key]["interval"][1] - y) for y, one in zip(ys, of, strict=True)],
                ]
                axis.errorbar(xs, ys, yerr=reach, fmt="o", color=colour, capsize=3, label=model)
                for x, y, one in zip(xs, ys, of, strict=True):
                    axis.annotate(one["name"], (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
            axis.set_xlabel("bytes, of bf16's")
        legend_below(figure, axes)
