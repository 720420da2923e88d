# SPDX-License-Identifier: Apache-2.0
"""What becomes of KV that goes through a format and back, plane by plane and layer by layer, in torch.

For controls (nothing is left of it) and for formats that are considered: they are measured before they are built.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from sage_kv_connector.contract.dtypes import DTYPE_BITS
from sage_kv_connector.format.defaults import default_format
from sage_kv_connector.format.wire_format import WireFormat
from scripts.format_round_trip import Variant, round_trip

#: Tokens that share the scales of a channel with 2 bits.
GROUP = 64
LEVELS_OF_2_BITS = 3
#: ``zero``: nothing; ``int2``: 2 bits with a scale and a zero point by channel of keys, by token of values; ``cast``:
#: fp8_e4m3 with scale 1, as an fp8 cache has it; the others are the wire's formats.
KINDS = ("bf16", "zero", "int2", "cast", "int4", "fp8_e4m3")


@dataclass(frozen=True)
class KVChange:
    """``k``, ``v``: a kind for each plane; ``edge``: of both in the first and last ``edge_layers`` of ``layers``."""

    when: Literal["sent", "written"]
    k: str
    v: str
    edge: str | None = None
    edge_layers: int = 0
    layers: int = 0

    def __post_init__(self) -> None:
        for name in ("k", "v", "edge"):
            kind = getattr(self, name)
            if kind not in KINDS and not (name == "edge" and kind is None):
                raise ValueError(f"{name} is {kind!r}, allowed: {', '.join(KINDS)}")
        if self.edge is not None and self.layers < 2 * self.edge_layers:
            raise ValueError(
                f"layers is {self.layers}, must be at least twice edge_layers, {self.edge_layers}"
            )

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> KVChange:
        """Raises ValueError and TypeError for another object than ``to_json`` writes."""
        return cls(**json.loads(text))

    def kind(self, plane: str, layer: int) -> str:
        """Of ``plane`` ("k" or "v") in ``layer``, counted from 0."""
        at_edge = layer < self.edge_layers or layer >= self.layers - self.edge_layers
        if self.edge is not None and at_edge:
            return self.edge
        return self.k if plane == "k" else self.v

    def apply(self, plane: str, layer: int, values: torch.Tensor) -> torch.Tensor:
        """(tokens, heads, dim) from a prompt's first token on → what is left of it, in the same dtype."""
        kind = self.kind(plane, layer)
        if kind == "bf16":
            return values
        if kind == "zero":
            return torch.zeros_like(values)
        by_head = values.float().transpose(0, 1).contiguous()
        if kind == "int2":
            left = _two_bits(by_head, by_token=plane == "v")
        else:
            fmt = WireFormat("fp8_e4m3") if kind == "cast" else default_format(kind, plane)
            left = round_trip(by_head, Variant(fmt))
        return left.transpose(0, 1).to(values.dtype)

    def bits(self, tokens: int, dim: int) -> float:
        """Mean bits of an element on the wire, of ``tokens`` tokens of ``dim`` channels, a multiple of 64 tokens."""
        kinds = [self.kind(plane, layer) for layer in range(max(1, self.layers)) for plane in "kv"]
        planes = ["k", "v"] * max(1, self.layers)
        each = [_bits(kind, plane, tokens, dim) for kind, plane in zip(kinds, planes, strict=True)]
        return sum(each) / len(each)


def _bits(kind: str, plane: str, tokens: int, dim: int) -> float:
    if kind == "zero":
        return 0.0
    if kind == "int2":
        return 2 + 2 * 16 / (dim if plane == "v" else GROUP)
    if kind in ("bf16", "cast"):
        return float(DTYPE_BITS["bf16" if kind == "bf16" else "fp8_e4m3"])
    fmt = default_format(kind, plane)
    group = min(tokens, fmt.group_tokens)
    return 8 * fmt.tile_bytes(group, dim) / (group * dim)


def _two_bits(values: torch.Tensor, *, by_token: bool) -> torch.Tensor:
    """(heads, tokens, dim), a scale and a zero point for each token, or for each channel of 64 tokens."""
    parts = []
    for group in values.split(GROUP, dim=1):
        axis = 2 if by_token else 1
        low, high = group.amin(axis, keepdim=True), group.amax(axis, keepdim=True)
        scale = ((high - low) / LEVELS_OF_2_BITS).clamp_min(torch.finfo(torch.float32).tiny)
        parts.append(((group - low) / scale).round() * scale + low)
    return torch.cat(parts, dim=1)
