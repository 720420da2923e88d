# SPDX-License-Identifier: Apache-2.0
"""What two caches come to before any transfer."""

from __future__ import annotations

import msgspec

from sage_kv_connector.backends import backend_class
from sage_kv_connector.contract.failure import Code
from sage_kv_connector.contract.schema import CanonicalPlaneSchema, GroupSchema, KVCacheSchema, PlaneSchema
from sage_kv_connector.engine.session.agreement import SchemaVerdict, schema_verdict

TCP = backend_class("tcp").capabilities


def schema(layers: int, **changes: object) -> KVCacheSchema:
    plane = PlaneSchema("kv", (("head", 2), ("token", 16), ("content", 64)), 4096)
    planes = (CanonicalPlaneSchema("k", 32), CanonicalPlaneSchema("v", 32))
    names = tuple(f"layers.{index}" for index in range(layers))
    group = GroupSchema("fullattention", names, 16, (plane,), planes)
    base = KVCacheSchema("e", "m", "bf16", 4, 2, 0, 2, 32, (group,), weights="w")
    return msgspec.structs.replace(base, **changes)


def verdict(ours: KVCacheSchema, theirs: KVCacheSchema) -> SchemaVerdict:
    return schema_verdict(ours, theirs, TCP)


def test_layers_of_a_draft_model_that_prefill_has_not_are_named() -> None:
    found = verdict(schema(5), schema(4))
    assert found.refusal is None and found.no_kv_of == ("layers.4",)
    assert verdict(schema(4), schema(5)).no_kv_of == (), "prefill may draft alone"
    assert verdict(schema(4), schema(4)) == SchemaVerdict()


def test_a_pipeline_stage_need_not_have_all_layers() -> None:
    assert verdict(schema(5), schema(3, pp_size=2)).no_kv_of == ()


def test_other_weights_have_a_code_of_their_own() -> None:
    other = verdict(schema(4), schema(4, weights="x")).refusal
    assert (
        other is not None and other.code is Code.WEIGHTS and "weights: w here, x at the peer" in other.detail
    )
    both = verdict(schema(4), schema(4, weights="x", total_kv_heads=8)).refusal
    assert both is not None and both.code is Code.SCHEMA, "weights of another model are no news"
