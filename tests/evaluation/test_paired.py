# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.paired import divergence, mcnemar, mean, perplexity_ratio, relative_loss

BITS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)
DISTRIBUTION = st.lists(st.floats(0.01, 1.0), min_size=3, max_size=8)


def logprobs(weights: list[float], known: int) -> dict[int, float]:
    ranked = sorted(range(len(weights)), key=lambda i: -weights[i])[:known]
    return {i: math.log(weights[i] / sum(weights)) for i in ranked}


@given(st.lists(st.floats(0.1, 1.0), min_size=1, max_size=40), st.floats(0.1, 1.0))
def test_a_format_that_scales_every_score_loses_just_that(scores: list[float], left: float) -> None:
    found = relative_loss({"task": scores}, {"task": [left * score for score in scores]}, draws=200)
    assert found == pytest.approx((1 - left,) * 3)


def test_tasks_count_alike_however_many_items_they_have() -> None:
    base = {"long": [1.0] * 90, "short": [1.0] * 10}
    assert relative_loss(base, {"long": [1.0] * 90, "short": [0.0] * 10}).value == pytest.approx(0.5)


@given(BITS)
def test_the_interval_holds_the_loss_and_is_none_where_nothing_differs(
    pairs: list[tuple[bool, bool]],
) -> None:
    base, other = [1.0, *(float(one) for one, _ in pairs)], [1.0, *(float(two) for _, two in pairs)]
    found = relative_loss({"task": base}, {"task": other}, draws=500)
    assert found.low <= found.value <= found.high
    assert relative_loss({"task": base}, {"task": base}, draws=200) == (0.0, 0.0, 0.0)


def test_pairing_narrows_the_interval() -> None:
    base = [float(i % 2) for i in range(400)]
    one_lost = [0.0 if i == 1 else score for i, score in enumerate(base)]
    paired = relative_loss({"task": base}, {"task": one_lost})
    assert paired.value == pytest.approx(1 / 200)
    assert paired.high - paired.low < 0.03  # unpaired, the interval of either mean is ten times as wide


def test_other_items_are_refused() -> None:
    for other in ({"task": [1.0]}, {"else": [1.0, 0.0]}, {}):
        with pytest.raises(ValueError, match=r"items|tasks"):
            relative_loss({"task": [1.0, 0.0]}, other)
    with pytest.raises(ValueError, match="above 0"):
        relative_loss({"task": [0.0]}, {"task": [0.0]})


def test_mean_of_many_equal_values_is_sure() -> None:
    assert mean([2.0] * 5) == (2.0, 2.0, 2.0)
    spread = mean([0.0, 1.0] * 50)
    assert spread.low == pytest.approx(0.4, abs=0.03) and spread.high == pytest.approx(0.6, abs=0.03)


def test_perplexity_ratio_is_of_the_mean_token() -> None:
    ratio = perplexity_ratio([[-1.0, -2.0], [-3.0, -1.0]], [[-1.1, -2.1], [-3.1, -1.1]])
    assert ratio == pytest.approx((math.exp(0.1),) * 3)
    with pytest.raises(ValueError, match="tokens"):
        perplexity_ratio([[-1.0]], [[-1.0, -2.0]])


@given(DISTRIBUTION, DISTRIBUTION)
def test_divergence_is_at_most_the_true_one_and_zero_of_equals(one: list[float], two: list[float]) -> None:
    size = min(len(one), len(two))
    p, q = one[:size], two[:size]
    exact = sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    whole = divergence(logprobs(p, size), logprobs(q, size))
    assert whole == pytest.approx(exact, abs=1e-4)
    assert -1e-12 <= divergence(logprobs(p, size - 1), logprobs(q, size - 1)) <= exact + 1e-4
    assert divergence(logprobs(p, size), logprobs(p, size)) == 0.0


def test_mcnemar_knows_chance() -> None:
    assert mcnemar([1.0] * 5 + [0.0] * 5, [0.0] * 5 + [1.0] * 5) == 1.0
    assert mcnemar([1.0] * 10, [0.0] * 10) == pytest.approx(2 / 2**10)
    assert mcnemar([1.0, 0.0], [1.0, 0.0]) == 1.0
    with pytest.raises(ValueError, match="0 or 1"):
        mcnemar([0.5], [1.0])


@given(BITS)
def test_mcnemar_is_a_probability_and_symmetric(pairs: list[tuple[bool, bool]]) -> None:
    base, other = [float(one) for one, _ in pairs], [float(two) for _, two in pairs]
    assert 0 < mcnemar(base, other) <= 1
    assert mcnemar(base, other) == mcnemar(other, base)
