# SPDX-License-Identifier: Apache-2.0
"""Write docs/metrics.md: ``python -m scripts.metrics_document [--check]``.

With ``--check`` nothing is written; exit status 1 if the committed file is not what would be written.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sage_kv_connector.telemetry.recording.metrics import BUCKETS, METRICS, PREFIX, Kind

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"

_HEAD = f"""\
# Metrics

Made from `sage_kv_connector/telemetry/recording/metrics.py` by `python -m scripts.metrics_document`; don't edit it.

| where | name | labels before ours |
|---|---|---|
| `sage-kvt exporter` | `{PREFIX}…` | `engine`, `rank` |
| vLLM's `/metrics` | `vllm:{PREFIX}…` | `model_name`, `engine` |
| SGLang's `/metrics` (`--enable-metrics`) | `sglang:{PREFIX}…` | `model_name`, `engine_type`, `tp_rank`, `pp_rank` |

Times are in seconds, sizes in bytes. Histograms have buckets of powers of two from 1 µs to {BUCKETS[-1]:.0f} s. A
`peer` is `ENGINE[RANK]`. An engine keeps series for 64 peers; one more takes the place of the one that was quiet
longest, whose numbers go on under `other`. The exporter also has `{PREFIX}engines` and `{PREFIX}silent_engines`.

`vllm:nixl_*` are there, too, with the names, kinds and buckets of vLLM's NIXL connector, so that its dashboards work:
transfer time, time until a transfer was asked for, bytes, chunks, failed transfers, expired prefills. They are left out
where NIXL's own connector serves the same engine.

"""
_TITLES = {Kind.COUNTER: "Counters", Kind.GAUGE: "Gauges", Kind.HISTOGRAM: "Histograms"}


def document() -> str:
    """The whole file."""
    parts = [_HEAD]
    for kind, title in _TITLES.items():
        parts.append(f"## {title}\n\n| metric | labels | unit | meaning |\n|---|---|---|---|\n")
        for metric in METRICS.values():
            if metric.kind is kind:
                labels = ", ".join(f"`{label}`" for label in metric.labels)
                parts.append(
                    f"| `{PREFIX}{metric.name}` | {labels} | {_unit(metric.name)} | {metric.text} |\n"
                )
        parts.append("\n")
    return "".join(parts).rstrip("\n") + "\n"


def _unit(name: str) -> str:
    if name.endswith("bytes_per_second"):
        return "bytes a second"
    return next((unit for unit in ("seconds", "bytes", "tokens") if unit in name.split("_")), "")


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(int(DOCUMENT.read_text() != document()))
    DOCUMENT.write_text(document())
