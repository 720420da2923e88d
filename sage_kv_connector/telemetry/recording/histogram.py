# SPDX-License-Identifier: Apache-2.0
"""Times in buckets, with the sum of each bucket: so a merge of many keeps count and sum exact."""

from __future__ import annotations

from bisect import bisect_left

from sage_kv_connector.telemetry.recording.metrics import BUCKETS


class Histogram:
    """Over ``BUCKETS`` and what is longer."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.seconds = [0.0] * (len(BUCKETS) + 1)

    def add(self, seconds: float) -> None:
        bucket = bisect_left(BUCKETS, seconds)
        self.counts[bucket] += 1
        self.seconds[bucket] += seconds
