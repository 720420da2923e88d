# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import msgspec
import pytest

from sage_kv_connector.contract.schema import (
    CanonicalPlaneSchema,
    GroupSchema,
    KVCacheSchema,
    PlaneSchema,
    Verdict,
)


def schema(**changes: object) -> KVCacheSchema:
    plane = PlaneSchema("kv", (("head", 2), ("token", 16), ("content", 64)), 4096)
    group = GroupSchema("fullattention", ("a", "b"), 16, (plane,))
    base = KVCacheSchema("vllm 1", "model", "bf16", 2, 2, 0, 2, 32, (group,), packing="cpu-amx", weights="a")
    return msgspec.structs.replace(base, **changes)


def test_equal_schemas_are_identical_whatever_engine_and_model_are_called() -> None:
    comparison = schema().compare(schema(engine="sglang 2", model="/other/path"))
    assert comparison.verdict is Verdict.IDENTICAL
    assert schema().digest() == schema(engine="x").digest()


def test_weights_that_one_side_does_not_tell_are_not_compared() -> None:
    assert schema().compare(schema(weights="")).verdict is Verdict.IDENTICAL
    assert schema(weights="").compare(schema()).verdict is Verdict.IDENTICAL


@pytest.mark.parametrize(
    ("change", "field", "ours", "theirs"),
    [
        ({"dtype": "fp8_e4m3"}, "dtype", "bf16", "fp8_e4m3"),
        ({"tp_size": 2}, "tp_size", "1", "2"),
        ({"packing": "cpu-vec"}, "packing", "cpu-amx", "cpu-vec"),
        ({"head_dim": 64}, "head_dim", "32", "64"),
        ({"weights": "b"}, "weights", "a", "b"),
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


def canonical(**changes: object) -> KVCacheSchema:
    planes = (CanonicalPlaneSchema("k", 32), CanonicalPlaneSchema("v", 32))
    group = msgspec.structs.replace(schema().groups[0], canonical=planes)
    return msgspec.structs.replace(schema(groups=(group,)), **changes)


def test_what_conversion_covers_is_convertible_only_where_both_sides_are_canonical() -> None:
    group = canonical().groups[0]
    convertible = (
        {"dtype": "fp8_e4m3"},
        {"packing": "cpu-vec"},
        {"tp_size": 2, "head_count": 1},
        {"pp_size": 2, "groups": (msgspec.structs.replace(group, layers=("b",)),)},
        {"groups": (msgspec.structs.replace(group, page_size=32),)},
        {"groups": (msgspec.structs.replace(group, scales=((0.5, 1.0), (1.0, 1.0))),)},
    )
    for change in convertible:
        assert canonical().compare(canonical(**change)).verdict is Verdict.CONVERTIBLE, change
        assert schema().compare(canonical(**change)).verdict is Verdict.INCOMPATIBLE, change


def test_what_no_conversion_covers_stays_incompatible_and_is_named() -> None:
    group = canonical().groups[0]
    for change, message in (
        ({"dtype": "int8"}, "dtype: bf16 here, int8 at the peer (incompatible)"),
        ({"total_kv_heads": 4}, "total_kv_heads: 2 here, 4 at the peer"),
        ({"head_start": 2}, "head_start: 0 here, 2 at the peer (incompatible)"),
        ({"head_dim": 64}, "head_dim: 32 here, 64 at the peer"),
        (
            {"groups": (msgspec.structs.replace(group, layers=("c", "d")),)},
            "groups[0].layers",
        ),
        (
            {"groups": (msgspec.structs.replace(group, canonical=(CanonicalPlaneSchema("latent", 32),)),)},
            "groups[0].canonical: k[32] v[32] here, latent[32] at the peer",
        ),
    ):
        comparison = canonical().compare(canonical(**change))
        assert comparison.verdict is Verdict.INCOMPATIBLE
        assert message in comparison.explain()


def test_elements_of_a_dtype_that_no_conversion_knows_only_go_as_they_are() -> None:
    planes = (CanonicalPlaneSchema("k", 32), CanonicalPlaneSchema("v", 32))
    group = msgspec.structs.replace(schema().groups[0], canonical=planes)
    ours = schema(groups=(group,), dtype="int8_per_token_head")
    assert ours.compare(ours).verdict is Verdict.IDENTICAL
    larger = msgspec.structs.replace(ours, groups=(msgspec.structs.replace(group, page_size=32),))
    assert ours.compare(larger).verdict is Verdict.INCOMPATIBLE


def test_a_groups_own_dtype_is_compared_with_what_the_other_holds() -> None:
    group = schema().groups[0]
    codes = msgspec.structs.replace(group, dtype="uint8")
    ours, theirs = schema(groups=(group, codes)), schema(groups=(group, group))
    assert ours.compare(ours).verdict is Verdict.IDENTICAL
    assert ours.compare(theirs).verdict is Verdict.INCOMPATIBLE
    assert "groups[1].dtype: uint8 here, bf16 at the peer" in ours.compare(theirs).explain()
    said = schema(groups=(group, msgspec.structs.replace(group, dtype="bf16")))
    assert said.compare(theirs).verdict is Verdict.IDENTICAL, "said or left out, it is the same"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"page_size": 0}, "page_size is 0"),
        ({"scales": ((1.0, 1.0),)}, "scales has 1 rows"),
        ({"scales": ((1.0, 1.0), (1.0,))}, "allowed: none, or one of 2"),
        ({"scales": ((), ())}, "allowed: none, or one of 2"),
    ],
)
def test_a_peers_group_that_no_cache_has_is_refused(changes: dict[str, object], says: str) -> None:
    group = schema().groups[0]
    canonical = (CanonicalPlaneSchema("k", 32), CanonicalPlaneSchema("v", 32))
    sent = msgspec.to_builtins(msgspec.structs.replace(group, canonical=canonical)) | changes
    with pytest.raises(msgspec.ValidationError, match=says):
        msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=GroupSchema)


def test_what_is_said_of_a_peers_field_is_short_and_one_line() -> None:
    text = schema().compare(schema(packing="\n" * 50_000)).explain()
    assert text.isprintable() and len(text) < 600
