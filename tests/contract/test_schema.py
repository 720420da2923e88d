# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import msgspec
import pytest

from sage_kv_connector.contract.schema import GroupSchema, KVCacheSchema, PlaneSchema, Verdict


def schema(**changes: object) -> KVCacheSchema:
    plane = PlaneSchema("kv", (("head", 2), ("token", 16), ("content", 64)), 4096)
    group = GroupSchema("fullattention", ("a", "b"), 16, (plane,))
    base = KVCacheSchema("vllm 1", "model", "bf16", 2, 2, 0, 2, 32, (group,), packing="cpu-amx")
    return msgspec.structs.replace(base, **changes)


def test_equal_schemas_are_identical_whatever_engine_and_model_are_called() -> None:
    comparison = schema().compare(schema(engine="sglang 2", model="/other/path"))
    assert comparison.verdict is Verdict.IDENTICAL
    assert schema().digest() == schema(engine="x").digest()


@pytest.mark.parametrize(
    ("change", "field", "ours", "theirs"),
    [
        ({"dtype": "fp8_e4m3"}, "dtype", "bf16", "fp8_e4m3"),
        ({"tp_size": 2}, "tp_size", "1", "2"),
        ({"packing": "cpu-vec"}, "packing", "cpu-amx", "cpu-vec"),
        ({"head_dim": 64}, "head_dim", "32", "64"),
    ],
)
def test_a_difference_names_the_field_and_both_values(
    change: dict[str, object], field: str, ours: str, theirs: str
) -> None:
    comparison = schema().compare(schema(**change))
    assert comparison.verdict is Verdict.INCOMPATIBLE
    assert [(f.field, f.local, f.remote) for f in comparison.differences] == [(field, ours, theirs)]
    assert f"{field}: {ours} here, {theirs} at the peer" in comparison.explain()
    assert schema().digest() != schema(**change).digest()


def test_page_size_and_planes_of_groups_are_compared() -> None:
    group = schema().groups[0]
    other = schema(groups=(msgspec.structs.replace(group, page_size=32),))
    assert "groups[0].page_size: 16 here, 32 at the peer" in schema().compare(other).explain()
    fewer = schema(groups=())
    assert "groups: 1 here, 0 at the peer" in schema().compare(fewer).explain()


def test_bytes_per_token_counts_all_layers() -> None:
    assert schema().bytes_per_token() == 2 * 4096 / 16


def test_schema_survives_the_wire() -> None:
    data = msgspec.msgpack.encode(schema())
    assert msgspec.msgpack.decode(data, type=KVCacheSchema) == schema()
