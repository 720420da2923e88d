# SPDX-License-Identifier: Apache-2.0
"""Encode and decode whole caches at once in torch, and options that the wire format doesn't have.

Equal to the reference bit for bit where the reference has the option (checked by
``check_against_reference``); the reference goes tile by tile and is too slow for models.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from sage_kv_connector.contract.dtypes import CODE_MAX
from sage_kv_connector.format.reference import (
    decode_tile,
    encode_tile,
    from_float,
    levels,
    reciprocal_up,
    to_float,
)
from sage_kv_connector.format.wire_format import WireFormat

SCALE_MIN = 2.0**-100


class Variant(NamedTuple):
    """A format with measured options: ``rotate`` multiplies each token's channels by the Hadamard matrix,
    ``feedback`` adds a group's mean residual of each channel to the next group before coding."""

    fmt: WireFormat
    rotate: bool = False
    feedback: bool = False

    @property
    def name(self) -> str:
        fmt = self.fmt
        parts = [fmt.dtype]
        if fmt.sends_scales:
            parts += [fmt.granularity, str(fmt.group_tokens)]
        parts += ["zero"] * fmt.zero_point + ["rotate"] * self.rotate + ["feedback"] * self.feedback
        return " ".join(parts)


def _bf16_up(values: torch.Tensor) -> torch.Tensor:
    return ((values.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)


def _bf16_down(values: torch.Tensor) -> torch.Tensor:
    bits = values.view(torch.int32)
    cut = torch.where(bits < 0, (bits + 0xFFFF) & ~0xFFFF, bits & ~0xFFFF)
    return cut.view(torch.float32)


def code_groups(groups: torch.Tensor, fmt: WireFormat) -> torch.Tensor:
    """(…, tokens, dim) finite fp32 values, each (tokens, dim) a tile → what its decoding gives, fp32."""
    if fmt.granularity == "none":
        return _cast(groups, fmt.dtype)
    axis = {"channel": (-2,), "token": (-1,), "head": (-2, -1)}[fmt.granularity]
    if fmt.zero_point:
        zero = _bf16_down(groups.amin(axis, keepdim=True).contiguous())
        span = groups.amax(axis, keepdim=True) - zero
        scale = _bf16_up(span * torch.tensor(reciprocal_up(levels("int4")))).clamp_min(SCALE_MIN)
        steps = (groups - zero) * (1.0 / scale)
        return steps.clamp(0, 15).round() * scale + zero
    largest = groups.abs().amax(axis, keepdim=True)
    scale = _bf16_up(largest * torch.tensor(reciprocal_up(CODE_MAX[fmt.dtype]))).clamp_min(SCALE_MIN)
    steps = groups * (1.0 / scale)
    if fmt.dtype == "int4":
        return steps.clamp(-7, 7).round() * scale
    return _cast(steps, fmt.dtype) * scale


def _cast(values: torch.Tensor, dtype: str) -> torch.Tensor:
    if dtype == "bf16":
        return values.bfloat16().float()
    kind = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[dtype]
    most = CODE_MAX[dtype]
    return values.clamp(-most, most).to(kind).float()


def hadamard(values: torch.Tensor) -> torch.Tensor:
    """(…, dim) times the normalised Hadamard matrix, its own inverse; dim is a power of two."""
    dim, stride, out = values.shape[-1], 1, values
    while stride < dim:
        pairs = out.unflatten(-1, (dim // (2 * stride), 2, stride))
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        out = torch.stack([low + high, low - high], dim=-2).flatten(-3)
        stride *= 2
    return out * dim**-0.5


def round_trip(values: torch.Tensor, variant: Variant) -> torch.Tensor:
    """(…, tokens, dim) values from token 0 → through the wire and back into bf16, as fp32."""
    fmt, tokens = variant.fmt, values.shape[-2]
    values = hadamard(values) if variant.rotate else values
    full = tokens // fmt.group_tokens * fmt.group_tokens
    parts = []
    if variant.feedback:
        carried = torch.zeros_like(values[..., :1, :])
        for group in values.split(fmt.group_tokens, dim=-2):
            coded = code_groups(group + carried, fmt)
            carried = (group + carried - coded).mean(-2, keepdim=True)
            parts.append(coded)
    else:
        if full:
            groups = values[..., :full, :].unflatten(-2, (-1, fmt.group_tokens))
            parts.append(code_groups(groups, fmt).flatten(-3, -2))
        if full < tokens:
            parts.append(code_groups(values[..., full:, :], fmt))
    out = torch.cat(parts, dim=-2)
    return (hadamard(out) if variant.rotate else out).bfloat16().float()


def check_against_reference() -> None:
    """Raises AssertionError where ``round_trip`` and the reference differ in a bit."""
    rng = np.random.default_rng(3)
    values = to_float(from_float((rng.normal(size=(90, 64)) * 3).astype(np.float32), "bf16"), "bf16")
    for fmt in (
        WireFormat("fp8_e4m3"),
        WireFormat("fp8_e4m3", "channel", 32),
        WireFormat("fp8_e5m2", "token", 64),
        WireFormat("int4", "channel", 32, zero_point=True),
        WireFormat("int4", "token", 16),
        WireFormat("int4", "head", 64, zero_point=True),
    ):
        ours = round_trip(torch.from_numpy(values), Variant(fmt)).numpy()
        for first in range(0, len(values), fmt.group_tokens):
            group = values[first : first + fmt.group_tokens]
            decoded = decode_tile(encode_tile(group, fmt), fmt, *group.shape)
            theirs = to_float(from_float(decoded, "bf16"), "bf16")
            np.testing.assert_array_equal(ours[first : first + fmt.group_tokens], theirs, err_msg=str(fmt))
