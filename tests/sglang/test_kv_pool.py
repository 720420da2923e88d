# SPDX-License-Identifier: Apache-2.0
"""SGLang's pool, described by addresses only, against a pool of NumPy arrays."""

from __future__ import annotations

import ctypes
import re
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sage_kv_connector.contract.cache_view import group_view, strided_planes
from sage_kv_connector.contract.schema import KVCacheSchema, Verdict
from sage_kv_connector.engine.pages.target import window_segments
from sage_kv_connector.integrations.sglang.first_token import FirstTokenSlots
from sage_kv_connector.integrations.sglang.kv_pool import (
    LAYOUT_ENV,
    TILES_ENV,
    PoolShape,
    cache_dtype,
    cache_schema,
    cache_view,
)
from sage_kv_connector.integrations.sglang.metadata_rows import MetadataRows

LAYERS, PAGES, PAGE_SIZE, HEADS, DIM = 3, 5, 4, 2, 8
SHAPE = PoolShape("model", "bf16", LAYERS, 4, HEADS, False, 1, 2, 0, 1)


class Pool:
    """K buffers, then V buffers, of 2-byte elements in the order (slot, head, channel)."""

    def __init__(self, planes: int = 2, heads: int = HEADS, dim: int = DIM) -> None:
        rng = np.random.default_rng(0)
        shape = (PAGES * PAGE_SIZE, heads, dim)
        self.buffers = [rng.integers(0, 1 << 16, shape, dtype=np.uint16) for _ in range(planes * LAYERS)]
        self.args = SimpleNamespace(
            kv_data_ptrs=[buffer.ctypes.data for buffer in self.buffers],
            kv_data_lens=[buffer.nbytes for buffer in self.buffers],
            kv_item_lens=[buffer[0].nbytes * PAGE_SIZE for buffer in self.buffers],
            page_size=PAGE_SIZE,
            state_types=[],
            kv_layout=None,
            kv_layer_ids=[],
            num_draft_entries=0,
        )


@pytest.fixture(autouse=True)
def sglang_of_some_version(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("sglang")
    module.__version__ = "0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sglang", module)


def test_a_page_is_neighbouring_slots_of_each_layers_k_and_v() -> None:
    pool = Pool()
    view = cache_view(pool.args, SHAPE)
    assert [layer.name for layer in view.groups[0].layers] == [
        f"model.layers.{layer}.self_attn.attn" for layer in range(LAYERS)
    ]
    segments = window_segments(view, {0: np.array([3])})
    expected = []
    for layer in range(LAYERS):
        for buffer in (pool.buffers[layer], pool.buffers[LAYERS + layer]):
            page = buffer[3 * PAGE_SIZE : 4 * PAGE_SIZE]
            expected.append([page.ctypes.data, page.nbytes])
    assert segments.tolist() == expected
    schema = cache_schema(view, SHAPE)
    assert (schema.head_start, schema.head_count, schema.total_kv_heads, schema.head_dim) == (2, 2, 4, DIM)
    assert [(plane.name, plane.dim) for plane in schema.groups[0].canonical] == [("k", DIM), ("v", DIM)]


def test_a_latent_pool_has_one_plane_and_one_head() -> None:
    shape = SHAPE._replace(latent=True, heads=1, total_heads=1)
    view = cache_view(Pool(planes=1, heads=1, dim=20).args, shape)
    assert [(plane.name, plane.dim) for plane in view.groups[0].canonical] == [("latent", 20)]
    assert view.groups[0].kind == "mlaattention"


LATENT_SHAPE = SHAPE._replace(latent=True, heads=1, total_heads=1)


def pool_in_parts() -> SimpleNamespace:
    """As Ascend keeps a latent: the buffers of all layers' 32 channels, then those of the 16 with positions."""
    pools = [Pool(planes=1, heads=1, dim=dim) for dim in (32, 16)]
    fields = ("kv_data_ptrs", "kv_data_lens", "kv_item_lens")
    both = {name: [one for pool in pools for one in getattr(pool.args, name)] for name in fields}
    return SimpleNamespace(**(vars(pools[0].args) | both), kv_buf_groups=2, pools=pools)


def test_a_latent_in_two_parts_goes_as_it_is() -> None:
    args = pool_in_parts()
    view = cache_view(args, LATENT_SHAPE)
    segments = window_segments(view, {0: np.array([3])})
    expected = []
    for layer in range(LAYERS):
        for pool in args.pools:
            page = pool.buffers[layer][3 * PAGE_SIZE : 4 * PAGE_SIZE]
            expected.append([page.ctypes.data, page.nbytes])
    assert segments.tolist() == expected
    schema = cache_schema(view, LATENT_SHAPE)
    assert [plane.name for plane in schema.groups[0].planes] == ["latent", "rope"]
    one_buffer = cache_schema(cache_view(Pool(planes=1, heads=1, dim=48).args, LATENT_SHAPE), LATENT_SHAPE)
    assert schema.compare(schema).verdict is Verdict.IDENTICAL
    assert schema.compare(one_buffer).verdict is Verdict.INCOMPATIBLE
    args.page_size, args.kv_item_lens = PAGE_SIZE // 2, [length // 2 for length in args.kv_item_lens]
    compared = schema.compare(cache_schema(cache_view(args, LATENT_SHAPE), LATENT_SHAPE))
    assert (
        compared.verdict is Verdict.INCOMPATIBLE and "page_size: 4 here, 2 at the peer" in compared.explain()
    )


def test_tiles_of_a_latent_are_another_order_of_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    args = pool_in_parts()
    plain = cache_view(args, LATENT_SHAPE)
    monkeypatch.setenv(TILES_ENV, "1")
    tiled = cache_view(args, LATENT_SHAPE)
    pages = {0: np.array([1, 3])}
    assert np.array_equal(window_segments(plain, pages), window_segments(tiled, pages))
    compared = cache_schema(tiled, LATENT_SHAPE).compare(cache_schema(plain, LATENT_SHAPE))
    assert compared.verdict is Verdict.INCOMPATIBLE
    assert re.search(
        r"latent\[tile=2 token=4 dim=16; .* here, latent\[token=4 head=1 dim=32", compared.explain()
    )
    args.kv_item_lens[0] = args.kv_item_lens[1] = PAGE_SIZE * 2 * 8
    with pytest.raises(ValueError, match=r"8 channels are no multiple of 16 \(\$SGLANG_USE_FIA_NZ\)"):
        cache_view(args, LATENT_SHAPE)


def test_a_latent_in_more_parts_is_refused_by_name() -> None:
    args = pool_in_parts()
    args.kv_buf_groups = 3
    with pytest.raises(ValueError, match="kv_buf_groups 3 can't be transferred by sage_kvt; allowed: 1, 2"):
        cache_view(args, LATENT_SHAPE)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("state_types", ["mamba"]),
        ("state_types", ["swa", "mamba"]),
        ("kv_layout", "hnd"),
        ("num_draft_entries", 2),
        ("kv_layer_ids", [0, 2]),
        ("kv_buf_groups", 2),
    ],
)
def test_what_is_more_than_pages_is_refused_by_name(field: str, value: object) -> None:
    pool = Pool()
    setattr(pool.args, field, value)
    with pytest.raises(ValueError, match=rf"{field}.*can't be transferred"):
        cache_view(pool.args, SHAPE)


def test_an_order_that_kvargs_does_not_tell_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAYOUT_ENV, "vectorized_5d")
    with pytest.raises(
        ValueError, match=rf"{LAYOUT_ENV} 'vectorized_5d' can't be transferred .*allowed: nhd"
    ):
        cache_view(Pool().args, SHAPE)


def test_sizes_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="kv_item_lens: 128 bytes"):
        cache_view(Pool().args, SHAPE._replace(heads=3))
    pool = Pool()
    pool.args.kv_data_ptrs.pop()
    with pytest.raises(ValueError, match="kv_data_ptrs has 5 buffers"):
        cache_view(pool.args, SHAPE)


def test_dtypes_are_named_as_in_schemas() -> None:
    assert cache_dtype("auto", "torch.float32") == "fp32"
    assert cache_dtype("fp8_e5m2", "torch.bfloat16") == "fp8_e5m2"
    with pytest.raises(ValueError, match=r"kv_cache_dtype 'mxfp8'"):
        cache_dtype("mxfp8", "torch.bfloat16")


def test_metadata_rows_are_found_by_index() -> None:
    args = SimpleNamespace(aux_data_ptrs=[1000, 5000], aux_data_lens=[64 * 4, 8 * 4], aux_item_lens=[64, 8])
    assert MetadataRows(args).segments(3).tolist() == [[1192, 64], [5024, 8]]


class Metadata:
    """Metadata buffers of three rows: token ids, cached tokens, a wide one, rooms, checksums."""

    def __init__(self) -> None:
        self.output_ids = np.full((3, 16), 7, dtype=np.int32)
        self.cached = np.full((3, 16), 7, dtype=np.int32)
        self.wide = np.full((3, 40), 7, dtype=np.float32)
        self.rooms = np.zeros((3, 8), dtype=np.uint64)
        self.checksums = np.full((3, 8), 7, dtype=np.uint64)
        buffers: list[np.ndarray[Any, Any]] = [
            self.output_ids, self.cached, self.wide, self.rooms, self.checksums,
        ]  # fmt: skip
        self.args = SimpleNamespace(
            aux_data_ptrs=[buffer.ctypes.data for buffer in buffers],
            aux_data_lens=[buffer.nbytes for buffer in buffers],
            aux_item_lens=[buffer[0].nbytes for buffer in buffers],
        )


def land(slots: FirstTokenSlots, row: int, token: int) -> None:
    ((address, length),) = slots.segments(row).tolist()
    assert length == 8
    ctypes.c_int64.from_address(address).value = token


def test_the_first_token_of_another_engine_becomes_a_row_of_metadata() -> None:
    metadata = Metadata()
    slots = FirstTokenSlots(MetadataRows(metadata.args), -2)
    land(slots, 1, 4711)
    slots.commit(1, 99)
    assert metadata.output_ids[1, 0] == 4711 and metadata.rooms[1, 0] == 99
    for buffer in (metadata.cached, metadata.wide, metadata.checksums):
        assert not buffer[1].any() and (buffer[[0, 2]] == 7).all(), "only this row, nothing old in it"
    assert (metadata.output_ids[[0, 2]] == 7).all() and not metadata.rooms[[0, 2]].any()


@pytest.mark.parametrize("token", [-1, 1 << 31])
def test_what_is_no_token_is_refused(token: int) -> None:
    metadata = Metadata()
    slots = FirstTokenSlots(MetadataRows(metadata.args), -2)
    land(slots, 0, token)
    with pytest.raises(ValueError, match=f"first token is {token}"):
        slots.commit(0, 99)
    assert not metadata.rooms.any()


def test_buffers_of_another_shape_are_refused() -> None:
    metadata = Metadata()
    with pytest.raises(ValueError, match=r"buffer 2 \(bootstrap_room\) has rows of 160 bytes"):
        FirstTokenSlots(MetadataRows(metadata.args), 2)


def vllm_schema(kind: str = "fullattention", dim: int = DIM, heads: int = HEADS) -> KVCacheSchema:
    """vLLM's cache of the same model on a GPU: K and V of a layer in one tensor, other pages, one rank."""
    tensor = np.zeros((2, PAGES, 2 * PAGE_SIZE, 2 * heads, dim), dtype=np.uint16)
    axes = ("plane", "page", "token", "head", "dim")
    names = [f"model.layers.{layer}.self_attn.attn" for layer in range(LAYERS)]
    group = group_view(
        kind, 2 * PAGE_SIZE, PAGES, [(name, [("kv", tensor, axes)]) for name in names],
        heads=2 * heads, canonical=strided_planes("kv", tensor, axes),
    )  # fmt: skip
    return KVCacheSchema("vllm", "m", "bf16", LAYERS, 2 * heads, 0, 2 * heads, dim, (group.schema(),))


def test_vllms_cache_of_the_same_model_is_converted_and_of_another_is_refused_by_name() -> None:
    ours = cache_schema(cache_view(Pool().args, SHAPE), SHAPE)
    assert ours.compare(vllm_schema()).verdict is Verdict.CONVERTIBLE
    for other, field in (
        (vllm_schema(kind="slidingwindow:128"), r"groups\[0\].kind: fullattention here, slidingwindow:128"),
        (vllm_schema(dim=2 * DIM), f"head_dim: {DIM} here, {2 * DIM} at the peer"),
        (vllm_schema(heads=2 * HEADS), f"total_kv_heads: {2 * HEADS} here, {4 * HEADS} at the peer"),
    ):
        compared = ours.compare(other)
        assert compared.verdict is Verdict.INCOMPATIBLE and re.search(field, compared.explain())
