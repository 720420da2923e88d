# SPDX-License-Identifier: Apache-2.0
"""What a /metrics said at one moment, in the words of our own table, whoever said it."""

from __future__ import annotations

import re
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from sage_kv_connector.telemetry.recording.metrics import METRICS, PREFIX, Kind

#: Before our names at engines' /metrics.
_OURS = re.compile(rf"(?:vllm:|sglang:)?{PREFIX}(.+)")
#: What a sample of a histogram says, by the end of its name; buckets have the label ``le``.
_PARTS = ("_sum", "_count", "_bucket")


class Series(NamedTuple):
    """``name``: of the sample, without prefix. ``labels``: all it has, sorted."""

    name: str
    labels: tuple[tuple[str, str], ...]

    @property
    def metric(self) -> str:
        """Its row in the table of metrics; "" for none of ours."""
        if self.name in METRICS:
            return self.name
        ended = next((part for part in _PARTS if self.name.endswith(part)), "")
        metric = self.name.removesuffix(ended)
        return metric if ended and metric in METRICS else ""

    @property
    def grows(self) -> bool:
        """Whether it may never go back."""
        return METRICS[self.metric].kind is not Kind.GAUGE


class Scrape:
    """Our series, and as they are written those of vLLM that are named like NIXL's."""

    def __init__(self, text: str, engine: str = "") -> None:
        """``engine``: of an exporter's, only what this one says."""
        self.text = text
        self.values: dict[Series, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.endswith("_created") or engine not in ("", sample.labels.get("engine")):
                    continue
                ours = _OURS.fullmatch(sample.name)
                series = Series(ours[1] if ours else sample.name, tuple(sorted(sample.labels.items())))
                self.values[series] = sample.value

    def sum(self, name: str, **labels: str) -> float:
        """Of all samples of this name that have these labels; 0 of none."""
        return sum(value for _, value in self._of(name, labels))

    def by_label(self, name: str, label: str, **labels: str) -> Counter[str]:
        """The same by the value of one label, without those that are 0."""
        found: Counter[str] = Counter()
        for series, value in self._of(name, labels):
            found[dict(series.labels)[label]] += round(value)
        return +found

    def ours(self) -> Iterator[tuple[Series, float]]:
        return ((series, value) for series, value in self.values.items() if series.metric)

    def _of(self, name: str, labels: Mapping[str, str]) -> Iterator[tuple[Series, float]]:
        for series, value in self.values.items():
            if series.name == name and labels.items() <= dict(series.labels).items():
                yield series, value


def scrape(url: str, engine: str = "") -> Scrape:
    """``url``: of the server, without the path."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        return Scrape(response.read().decode(), engine)


NOTHING = Scrape("")


def named(metric: str, **labels: str) -> str:
    """As Prometheus writes a series."""
    inside = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    return f"{metric}{{{inside}}}" if inside else metric
