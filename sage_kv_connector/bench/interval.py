# SPDX-License-Identifier: Apache-2.0
"""How sure a figure is, by resampling what it was made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def interval(resamples: Sequence[float]) -> list[float]:
    """The lowest and the highest of the 95 of 100 in the middle."""
    return [float(end) for end in np.percentile(resamples, [2.5, 97.5])]
