# SPDX-License-Identifier: Apache-2.0
"""What a format costs, from scores of the same items with it and without: pure functions of numbers.

Intervals are of 95 % by the percentile bootstrap: items are drawn again, each with both of its scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

DRAWS = 10_000
LEVEL = 0.95
#: Of all other tokens together: log-probabilities come rounded.
LEAST = 1e-6
Scores = Mapping[str, Sequence[float]]


class Estimate(NamedTuple):
    """A figure and its interval."""

    value: float
    low: float
    high: float


def relative_loss(base: Scores, other: Scores, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """1 − (task average of ``other``) / (that of ``base``); each maps a task to its items' scores, in one order.

    Raises ValueError for other tasks or items, for none, and for an average of ``base`` that is not above 0.
    """
    if not base or base.keys() != other.keys():
        raise ValueError(f"tasks are {sorted(other)}, must be {sorted(base)} and some")
    tasks = [(np.asarray(base[name], float), np.asarray(other[name], float)) for name in base]
    if any(one.size == 0 or one.shape != two.shape for one, two in tasks):
        raise ValueError("items are not the same with both, or none")
    value = _loss(np.mean([one.mean() for one, _ in tasks]), np.mean([two.mean() for _, two in tasks]))
    rng = np.random.default_rng(seed)
    means = np.zeros((2, draws))
    for one, two in tasks:
        weights = rng.multinomial(one.size, np.full(one.size, 1 / one.size), size=draws) / one.size
        means += np.stack([weights @ one, weights @ two]) / len(tasks)
    usable = means[0] > 0
    return _interval(value, 1 - means[1][usable] / means[0][usable])


def mean(values: Sequence[float], *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """The mean of independent values. Raises ValueError for none."""
    known = np.asarray(values, float)
    if known.size == 0:
        raise ValueError("there are no values")
    weights = np.random.default_rng(seed).multinomial(
        known.size, np.full(known.size, 1 / known.size), size=draws
    )
    return _interval(float(known.mean()), weights @ known / known.size)


def perplexity_ratio(base: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> Estimate:
    """exp of the mean loss in log-probability of the same tokens; one sequence a passage, passages are drawn again."""
    if [len(one) for one in base] != [len(two) for two in other]:
        raise ValueError("tokens are not the same with both")
    losses = [float(np.mean(np.subtract(one, two))) for one, two in zip(base, other, strict=True)]
    return Estimate(*(math.exp(figure) for figure in mean(losses)))


def divergence(base: Mapping[int, float], other: Mapping[int, float]) -> float:
    """Kullback-Leibler divergence in nats of two distributions whose most likely tokens' log-probabilities are known.

    Tokens known of both count each for itself, all others together, so the true figure is at least this one.
    """
    shared = sorted(base.keys() & other.keys())
    p = [math.exp(base[token]) for token in shared]
    q = [math.exp(other[token]) for token in shared]
    p.append(max(LEAST, 1 - sum(p)))
    q.append(max(LEAST, 1 - sum(q)))
    p, q = [one / sum(p) for one in p], [one / sum(q) for one in q]
    total = 0.0
    for one, two in zip(p, q, strict=True):
        total += one * math.log(one / two)
    return max(0.0, total)


def mcnemar(base: Sequence[float], other: Sequence[float]) -> float:
    """The exact two-sided probability of so unequal a number of items won and lost by chance; scores are 0 or 1.

    Raises ValueError for other scores or lengths.
    """
    if len(base) != len(other) or not {*base, *other} <= {0.0, 1.0}:
        raise ValueError("scores are not 0 or 1 of the same items")
    lost = sum(one > two for one, two in zip(base, other, strict=True))
    won = sum(one < two for one, two in zip(base, other, strict=True))
    flips, fewer = lost + won, min(lost, won)
    tail = sum(math.comb(flips, count) for count in range(fewer + 1))
    return float(min(1.0, 2 * tail / 2**flips))


def _loss(base: float | np.floating, other: float | np.floating) -> float:
    if not base > 0:
        raise ValueError(f"the average without the format is {base}, must be above 0")
    return float(1 - other / base)


def _interval(value: float, drawn: npt.NDArray[np.float64]) -> Estimate:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))
