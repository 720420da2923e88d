# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch

from evaluation.kv_change import KVChange
from sage_kv_connector.format.defaults import default_format
from sage_kv_connector.format.reference import decode_tile, encode_tile


def keys(tokens: int = 130) -> torch.Tensor:
    """(tokens, heads, dim)"""
    return (
        torch.from_numpy(np.random.default_rng(1).normal(size=(tokens, 2, 64)).astype(np.float32))
        .bfloat16()
        .float()
    )


@pytest.mark.parametrize("plane", ["k", "v"])
def test_int4_is_what_the_wire_makes_of_it(plane: str) -> None:
    values, fmt = keys(), default_format("int4", plane)
    left = KVChange("sent", "int4", "int4").apply(plane, 0, values)
    for head in range(2):
        for first in (0, 64, 128):
            group = values[first : first + 64, head].numpy()
            decoded = torch.from_numpy(decode_tile(encode_tile(group, fmt), fmt, *group.shape))
            torch.testing.assert_close(
                left[first : first + 64, head], decoded.bfloat16().float(), rtol=0, atol=0
            )


def test_controls_leave_little() -> None:
    values = keys()
    assert not KVChange("sent", "zero", "zero").apply("k", 3, values).any()
    two_bits = KVChange("sent", "int2", "int2").apply("k", 3, values)
    assert len(two_bits[:64, 0, 5].unique()) <= 4
    error = ((two_bits - values) ** 2).mean().sqrt()
    assert 0.2 < error < 0.6  # of values whose deviation is 1


def test_edges_and_planes_take_their_own_kind() -> None:
    change = KVChange("sent", "int4", "bf16", edge="fp8_e4m3", edge_layers=2, layers=6)
    assert [change.kind("k", layer) for layer in range(6)] == ["fp8_e4m3"] * 2 + ["int4"] * 2 + [
        "fp8_e4m3"
    ] * 2
    assert change.kind("v", 2) == "bf16"
    values = keys()
    assert change.apply("v", 2, values) is values


def test_bits_are_those_of_the_formats() -> None:
    assert KVChange("sent", "int4", "int4").bits(64, 64) == 4.5
    assert KVChange("sent", "int4", "bf16", layers=4).bits(64, 64) == (4.5 + 16) / 2
    edges = KVChange("sent", "int4", "int4", edge="fp8_e4m3", edge_layers=1, layers=4)
    assert edges.bits(64, 64) == (4.5 + 8.25) / 2


def test_it_goes_through_json_and_refuses_other_kinds() -> None:
    change = KVChange("sent", "int4", "bf16", edge="fp8_e4m3", edge_layers=2, layers=6)
    assert KVChange.from_json(change.to_json()) == change
    with pytest.raises(ValueError, match="k is 'int3'"):
        KVChange("sent", "int3", "int4")
    with pytest.raises(ValueError, match="layers is 3"):
        KVChange("sent", "int4", "int4", edge="cast", edge_layers=2, layers=3)
