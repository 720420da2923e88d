# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest

from evaluation.kv_change import KVChange
from evaluation.measure import Measured, right_share
from evaluation.pair import Counts
from evaluation.report import Shape, result, rows

TOPS = [[{1: math.log(0.7), 2: math.log(0.3)}]]


def measured(arm: str, scores: list[float], wire_bytes: int, *, model: str = "m", void: str = "") -> Measured:
    shares = [0.1 + 0.5 * score for score in scores]
    counts = Counts(10, 1000, wire_bytes, 64_000, 0, 0)
    return Measured(model, arm, {"task": scores}, {"task": shares}, [[-1.0, -2.0]], TOPS, counts, void)


PLAIN = Shape(64, None)


def test_loss_bytes_and_control_are_of_their_arms() -> None:
    arms = [
        measured("bf16", [1.0, 1.0, 1.0, 0.0], 32_000),
        measured("int4", [1.0, 1.0, 0.0, 0.0], 9_000),
        measured("zeroed", [0.0, 0.0], 32_000),
    ]
    shapes = {
        ("m", "bf16"): PLAIN,
        ("m", "int4"): PLAIN,
        ("m", "zeroed"): Shape(64, KVChange("sent", "zero", "zero")),
    }
    report = result(arms, shapes)
    (int4,), (control,) = report["formats"], report["control"]
    assert int4["name"] == "int4" and int4["loss"] == pytest.approx(1 / 3)
    assert int4["bytes_ratio"] == pytest.approx(9 / 32)
    assert int4["tasks"]["task"] == {"items": 4, "bf16": 0.75, "score": 0.5, "mcnemar": 1.0}
    assert control["loss"] == 1.0 and control["emulated"], "of the two items that it has"
    assert len(list(rows(report))) == 3


def test_formats_of_several_models_are_put_together() -> None:
    arms = [
        measured(arm, scores, 1000, model=model)
        for model in ("m", "n")
        for arm, scores in (("bf16", [1.0, 1.0]), ("int4", [1.0, 0.0] if model == "m" else [1.0, 1.0]))
    ]
    report = result(arms, {(model, arm): PLAIN for model in ("m", "n") for arm in ("bf16", "int4")})
    (both,) = [one for one in report["formats"] if one["model"] == "all"]
    assert both["loss"] == pytest.approx(0.25)


def test_a_void_arm_has_no_figures() -> None:
    arms = [measured("bf16", [1.0], 1000), measured("int4", [0.0], 100, void="decode computed 3 tokens")]
    report = result(arms, {("m", "bf16"): PLAIN, ("m", "int4"): PLAIN})
    assert report["formats"] == [] and report["void"] == {"m, int4": "decode computed 3 tokens"}
    with pytest.raises(ValueError, match="bf16 of m"):
        result(
            [measured("bf16", [1.0], 1000, void="why"), measured("int4", [1.0], 100)], {("m", "int4"): PLAIN}
        )


def test_the_share_of_the_right_choice() -> None:
    assert right_share([math.log(0.1), math.log(0.3)], 1) == pytest.approx(0.75)
    assert right_share([-1000.0, -1000.0], 0) == 0.5
