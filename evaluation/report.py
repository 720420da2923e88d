# SPDX-License-Identifier: Apache-2.0
"""What was measured as one object: each format's bytes and losses against bf16, and the control's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.arms import BASE, CONTROLS
from evaluation.kv_change import KVChange
from evaluation.measure import Measured
from evaluation.paired import Estimate, divergence, mcnemar, mean, perplexity_ratio, relative_loss

ALL = "all"


@dataclass(frozen=True)
class Shape:
    """Of a model's heads, for the bytes of what is emulated. ``change``: what stands for the wire, if so."""

    dim: int
    change: KVChange | None


#: Tokens over which the bits of an emulated format are taken.
TOKENS = 64


def compared(base: Measured, other: Measured, shape: Shape) -> dict[str, Any]:
    """One format of one model. Items that only one of both has are left out. Raises ValueError where none are left."""
    scores = {
        task: _common(base.scores[task], other.scores[task]) for task in _shared(base.scores, other.scores)
    }
    shares = {
        task: _common(base.probabilities[task], other.probabilities[task])
        for task in _shared(base.probabilities, other.probabilities)
    }
    continuations = _common(base.continuations, other.continuations)
    tops = _common(base.tops, other.tops)
    kl = [
        sum(divergence(p, q) for p, q in zip(one, two, strict=True)) / len(one)
        for one, two in zip(*tops, strict=True)
    ]
    same = [
        float(max(p, key=p.__getitem__) == max(q, key=q.__getitem__))
        for one, two in zip(*tops, strict=True)
        for p, q in zip(one, two, strict=True)
    ]
    return {
        "name": other.arm,
        "model": other.model,
        "emulated": shape.change is not None,
        "bytes_ratio": _bytes_ratio(base, other, shape),
        **_loss("loss", "interval", scores),
        **_loss("probability_loss", "probability_interval", shares),
        "perplexity_ratio": _figure(perplexity_ratio(*continuations)),
        "kl": _figure(mean(kl)),
        "same_next_token": sum(same) / len(same),
        "tasks": {
            task: {
                "items": len(one),
                BASE: sum(one) / len(one),
                "score": sum(two) / len(two),
                "mcnemar": mcnemar(one, two),
            }
            for task, (one, two) in scores.items()
        },
        "hand_overs": other.counts.hand_overs,
        "tokens_handed_over": other.counts.tokens,
        "recomputed_tokens": other.counts.recomputed_tokens,
        "wire_bytes": other.counts.wire_bytes,
    }


def over_all(pairs: Sequence[tuple[Measured, Measured]]) -> dict[str, Any]:
    """One format over the tasks of all models: (bf16, format) of each."""
    scores, shares = {}, {}
    for base, other in pairs:
        for task in _shared(base.scores, other.scores):
            scores[f"{base.model}/{task}"] = _common(base.scores[task], other.scores[task])
        for task in _shared(base.probabilities, other.probabilities):
            shares[f"{base.model}/{task}"] = _common(base.probabilities[task], other.probabilities[task])
    return {
        "name": pairs[0][1].arm,
        "model": ALL,
        **_loss("loss", "interval", scores),
        **_loss("probability_loss", "probability_interval", shares),
    }


def result(measured: Sequence[Measured], shapes: Mapping[tuple[str, str], Shape]) -> dict[str, Any]:
    """``formats``, ``control`` and ``void``; ``shapes``: by model and arm.

    Raises ValueError where bf16 is void or not there.
    """
    bases = {one.model: one for one in measured if one.arm == BASE and not one.void}
    formats: list[dict[str, Any]] = []
    by_arm: dict[str, list[tuple[Measured, Measured]]] = {}
    for one in measured:
        if one.arm == BASE or one.void:
            continue
        if one.model not in bases:
            raise ValueError(
                f"{BASE} of {one.model} is void or was not measured: there is nothing to compare with"
            )
        formats.append(compared(bases[one.model], one, shapes[one.model, one.arm]))
        by_arm.setdefault(one.arm, []).append((bases[one.model], one))
    formats += [over_all(pairs) for pairs in by_arm.values() if len(pairs) > 1]
    return {
        "tasks": {
            one.model: {
                task: {"items": len(each), BASE: sum(each) / len(each)} for task, each in one.scores.items()
            }
            for one in bases.values()
        },
        "formats": [one for one in formats if one["name"] not in CONTROLS],
        "control": [one for one in formats if one["name"] in CONTROLS],
        "void": {f"{one.model}, {one.arm}": one.void for one in measured if one.void},
    }


def rows(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The report as a table for people."""
    for model, tasks in report["tasks"].items():
        scores = ", ".join(f"{task} {one[BASE]:.1%} of {one['items']}" for task, one in tasks.items())
        yield f"{model}, {BASE}", scores
    for one in (*report["formats"], *report["control"]):
        low, high = one["interval"]
        text = f"loses {one['loss']:.2%} ({low:.2%} to {high:.2%})"
        low, high = one["probability_interval"]
        text += f", of the right choice's probability {one['probability_loss']:.2%} ({low:.2%} to {high:.2%})"
        if "kl" in one:
            text += f", {one['bytes_ratio']:.3f} of the bytes, perplexity × {one['perplexity_ratio']['value']:.4f}"
            text += f", KL {one['kl']['value']:.5f}, {one['same_next_token']:.1%} next tokens the same"
        yield f"{one['model']}, {one['name']}", text
    for name, why in report.get("missing", {}).items():
        yield name, why
    for name, why in report["void"].items():
        yield name, f"VOID: {why}"


def _bytes_ratio(base: Measured, other: Measured, shape: Shape) -> float:
    """Bytes a token on the wire against bf16's, by the metrics; by the format's definition where it is emulated."""
    if shape.change is not None:
        return shape.change.bits(TOKENS, shape.dim) / 16
    return (other.counts.wire_bytes / other.counts.tokens) / (base.counts.wire_bytes / base.counts.tokens)


def _loss(name: str, interval: str, pairs: Mapping[str, tuple[list[float], list[float]]]) -> dict[str, Any]:
    lost = relative_loss(
        {task: one for task, (one, _) in pairs.items()}, {task: two for task, (_, two) in pairs.items()}
    )
    return {name: lost.value, interval: [lost.low, lost.high]}


def _figure(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "interval": [estimate.low, estimate.high]}


def _shared(one: Mapping[str, object], two: Mapping[str, object]) -> list[str]:
    return [name for name in one if name in two]


def _common(one: list[Any], two: list[Any]) -> tuple[list[Any], list[Any]]:
    """The items that both have: they are asked in one order."""
    count = min(len(one), len(two))
    return one[:count], two[:count]
