# SPDX-License-Identifier: Apache-2.0
"""What vLLM's caches may be: every dtype, latents, K and V of different size, groups whose layers differ."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.config.cache import CacheDType
from vllm.platforms import current_platform
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVQuantMode,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
    get_kv_quant_mode,
)

from sage_kv_connector.contract.dtypes import CONVERTIBLE_DTYPES
from sage_kv_connector.contract.schema import KVCacheSchema, Verdict
from sage_kv_connector.integrations.vllm.cache_schema import cache_schema
from sage_kv_connector.integrations.vllm.kv_caches import VllmCaches, vllm_caches
from sage_kv_connector.integrations.vllm.specs import recurrent, sliding_window
from tests.integrations.vllm_workers import (
    BLOCKS,
    DIM,
    PAGE,
    SPEC,
    TOKENS,
    Worker,
    cache_config,
    finished,
    handed_over,
    load,
    offered,
    progress,
    tensor,
    vllm_config,
)

#: Of vLLM's literal, those of later releases, and one that a platform registered.
DTYPES = [
    *dict.fromkeys(
        [*get_args(CacheDType), "octave_k3v4", "octave_k3v3", "octave_k3v3_compact", "a-platforms"]
    )
]
LATENT = MLAAttentionSpec(block_size=PAGE, num_kv_heads=1, head_size=96, dtype=torch.bfloat16)
INDEXER = MLAAttentionSpec(block_size=PAGE, num_kv_heads=1, head_size=132, dtype=torch.uint8)


@pytest.fixture(autouse=True)
def plain_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """K and V of each token side by side, as everywhere but in vLLM's CPU kernels."""
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)


def spec_of(dtype: str, page: int = PAGE) -> Any:
    """A layer's spec as vLLM and its attention backends make it for a cache dtype."""
    mode = get_kv_quant_mode(dtype)
    element = STR_DTYPE_TO_TORCH_DTYPE.get(dtype, torch.uint8)
    if dtype == "auto":
        element = torch.bfloat16
    if dtype.endswith("_ds_mla"):
        return MLAAttentionSpec(
            block_size=page, num_kv_heads=1, head_size=576, dtype=element, kv_quant_mode=mode,
            cache_dtype_str=dtype, state_content_bytes={"fp8_ds_mla": 656, "nvfp4_ds_mla": 352}[dtype],
        )  # fmt: skip
    spec = FullAttentionSpec(
        block_size=page, num_kv_heads=2, head_size=DIM, dtype=element, kv_quant_mode=mode
    )
    if mode.is_per_token_head or mode.is_turboquant or mode.is_ultraquant:
        return replace(spec, state_content_bytes=2 * DIM + 8)
    if mode.is_nvfp4:
        return replace(spec, num_head_slots=4, state_content_bytes=DIM // 2 + 2)
    return spec


@contextmanager
def workers(dtype: str, prefill: Any, decode: Any) -> Iterator[tuple[Worker, Worker]]:
    made = []
    for name, seed, spec in (("prefill", 1, prefill), ("decode", 2, decode)):
        layers = {"l0": spec, "l1": spec}
        groups = cache_config((layers, spec))
        made.append(Worker(name, seed, "tcp", specs=layers, groups=groups, cache_dtype=dtype))
    yield made[0], made[1]
    for worker in made:
        worker.close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cache_of_any_dtype_moves_between_equals(dtype: str) -> None:
    with workers(dtype, spec_of(dtype), spec_of(dtype)) as (prefill, decode):
        assert handed_over(prefill, decode, "t", [1, 2, 3], [4, 6, 5])


@pytest.mark.parametrize("dtype", DTYPES)
def test_to_another_page_size_it_is_converted_right_or_refused_by_name(
    dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    with workers(dtype, spec_of(dtype), spec_of(dtype, 2 * PAGE)) as (prefill, decode):
        prefill.step(offers=[offered("t")], progress=[progress("t", (1, 2, 3), TOKENS)])
        prefill.step(finished=[finished("t", (1, 2, 3))])
        wanted = load(prefill.prefill(), "t", [4, 6])
        wanted = replace(wanted, pages=(wanted.pages[0]._replace(tokens=range(TOKENS)),))
        with caplog.at_level(logging.WARNING):
            first = decode.step(loads=[wanted])
            results = decode.until(lambda one: bool(one.received), first)
        schema = decode.side.registered()[2]
        assert bool(results.failed) == (schema.dtype not in CONVERTIBLE_DTYPES)
        if results.failed:
            assert "groups[0].page_size: 32 here, 16 at the peer" in caplog.text
            return
        for there, here in zip(prefill.caches.values(), decode.caches.values(), strict=True):
            sent, landed = (tokens(one, ids) for one, ids in ((there, [1, 2, 3]), (here, [4, 6])))
            assert sent[:TOKENS] == landed[:TOKENS]


def tokens(cache: torch.Tensor, pages: list[int]) -> list[bytes]:
    """Bytes of each token of these pages, [blocks, heads, tokens, content]."""
    chosen = cache[pages].view(torch.uint8).permute(0, 2, 1, 3)
    return [one.contiguous().numpy().tobytes() for one in chosen.reshape(-1, *chosen.shape[2:])]


def described(layers: dict[str, Any], dtype: str = "auto", **config: Any) -> tuple[VllmCaches, Any]:
    """Caches of one vLLM group with these layers, and their schema."""
    kinds = list({id(spec): spec for spec in layers.values()}.values())
    spec = kinds[0] if len(kinds) == 1 else UniformTypeKVCacheSpecs.from_specs(layers)
    assert spec is not None
    groups = cache_config((layers, spec))
    tensors = {name: tensor(i, one) for i, (name, one) in enumerate(layers.items())}
    made = vllm_config(cache_dtype=dtype, **config)
    caches = vllm_caches(tensors, made, groups)
    return caches, cache_schema(caches.view, made, groups, 0, 0, "")


def test_a_latent_cache_of_four_axes_has_one_plane_without_k_and_v() -> None:
    caches, schema = described({"l0": LATENT, "l1": LATENT}, heads=16)
    (group,) = schema.groups
    assert [(plane.name, plane.dim) for plane in group.canonical] == [("latent", 96)]
    assert group.planes[0].name == "latent" and group.kind == "mlaattention"
    assert (schema.total_kv_heads, schema.head_count, schema.packing) == (1, 1, "")
    assert caches.tables == (0,)


def test_a_latent_cache_is_what_sglang_says_of_its_own() -> None:
    """Three axes, as releases before 0.32 and SGLang have them, and four are one schema but for the strides."""
    _, four = described({"l0": LATENT})
    made, groups = vllm_config(), cache_config(({"l0": LATENT}, LATENT))
    three = cache_schema(
        vllm_caches({"l0": tensor(0, LATENT)[:, 0]}, made, groups).view, made, groups, 0, 0, ""
    )
    assert four.compare(three).verdict is Verdict.CONVERTIBLE


def test_k_and_v_of_different_size_are_told_apart() -> None:
    uneven = replace(SPEC, head_size=48, head_size_v=16)
    _, schema = described({"l0": uneven})
    assert [(plane.name, plane.dim) for plane in schema.groups[0].canonical] == [("k", 48), ("v", 16)]
    _, other = described({"l0": replace(SPEC, head_size=32, head_size_v=32)})
    comparison = schema.compare(other)
    assert comparison.verdict is Verdict.INCOMPATIBLE
    assert "groups[0].canonical: k[48] v[16] here, k[32] v[32] at the peer" in comparison.explain()
    with workers("auto", uneven, uneven) as (prefill, decode):
        assert handed_over(prefill, decode, "t", [1, 2, 3], [4, 6, 5])


@pytest.mark.parametrize(
    "spec",
    [
        replace(SPEC, num_head_slots=2, state_content_bytes=2 * DIM * 2),
        replace(SPEC, tokens_per_state=4),
        replace(
            SPEC, kv_quant_mode=KVQuantMode.FP8_PER_TOKEN_HEAD, dtype=torch.uint8, state_content_bytes=72
        ),
    ],
    ids=["K and V as heads", "compressed states", "scales in the page"],
)
def test_pages_with_another_content_only_go_as_they_are(spec: Any) -> None:
    _, schema = described({"l0": spec})
    assert schema.groups[0].canonical == ()


def test_layers_that_keep_different_things_are_groups_of_one_table() -> None:
    layers = {"l0.attn": LATENT, "l0.indexer": INDEXER, "l1.attn": LATENT, "l1.indexer": INDEXER}
    caches, schema = described(layers)
    assert [group.layers for group in schema.groups] == [
        ("l0.attn", "l1.attn"),
        ("l0.indexer", "l1.indexer"),
    ]
    assert [group.dtype for group in schema.groups] == ["", "uint8"]
    assert caches.tables == (0, 0)
    assert schema.groups[1].canonical == ()


@pytest.mark.parametrize(
    ("layers", "dtype"),
    [
        ({"l0": LATENT, "i0": INDEXER, "l1": LATENT, "i1": INDEXER}, "auto"),
        ({"l0": SPEC, "l1": replace(SPEC, num_kv_heads=4), "l2": SPEC}, "auto"),
        ({"l0": spec_of("fp8"), "l1": SPEC}, "fp8"),
    ],
    ids=["an indexer", "other head counts", "a layer that is not quantized"],
)
def test_every_layer_of_such_groups_moves(layers: dict[str, Any], dtype: str) -> None:
    window = SlidingWindowSpec(
        block_size=PAGE, num_kv_heads=2, head_size=DIM, dtype=torch.bfloat16, sliding_window=TOKENS
    )
    groups = cache_config(
        (layers, UniformTypeKVCacheSpecs.from_specs(layers)), KVCacheGroupSpec(["w0"], window)
    )
    made = [
        Worker(name, seed, "shm", specs={**layers, "w0": window}, groups=groups, cache_dtype=dtype)
        for name, seed in (("prefill", 1), ("decode", 2))
    ]
    try:
        assert made[0].side._registered is not None
        assert made[0].side._registered._tables._tables == (0, 0, 1)
        assert handed_over(made[0], made[1], "t", [1, 2, 3], [4, 6, 5])
    finally:
        for worker in made:
            worker.close()


def test_layers_that_are_not_quantized_are_not_taken_for_those_that_are() -> None:
    """The same bytes a page, and codes of another dtype: nothing may move."""
    fp8 = spec_of("fp8")

    def schema(other: torch.dtype) -> KVCacheSchema:
        found: KVCacheSchema = described({"l0": fp8, "l1": replace(SPEC, dtype=other)}, "fp8")[1]
        return found

    comparison = schema(torch.bfloat16).compare(schema(torch.float16))
    assert comparison.verdict is Verdict.INCOMPATIBLE
    assert "groups[1].dtype: bf16 here, fp16 at the peer" in comparison.explain()


def test_states_of_another_dtype_are_other_states() -> None:
    def schema(dtype: torch.dtype) -> Any:
        spec = MambaSpec(block_size=PAGE, shapes=((4, 8),), dtypes=(dtype,))
        groups = cache_config(({"m": spec}, spec), ({"l0": SPEC}, SPEC))
        states = torch.zeros((BLOCKS, 1, 1, spec.state_content_size_bytes), dtype=torch.int8)
        made = vllm_config()
        view = vllm_caches({"m": states, "l0": tensor(0)}, made, groups).view
        return cache_schema(view, made, groups, 0, 0, "")

    comparison = schema(torch.float16).compare(schema(torch.bfloat16))
    assert comparison.verdict is Verdict.INCOMPATIBLE
    assert "groups[0].dtype: fp16 here, bf16 at the peer" in comparison.explain()


def test_other_codes_for_the_same_numbers_are_another_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    _, schema = described({"l0": spec_of("fp8")}, "fp8")
    assert schema.dtype == "fp8_e4m3" and schema.groups[0].canonical
    monkeypatch.setattr(type(current_platform), "is_fp8_fnuz", lambda *_: True)
    _, fnuz = described({"l0": spec_of("fp8")}, "fp8")
    assert fnuz.dtype == "fp8_e4m3fnuz" and not fnuz.groups[0].canonical
    assert "dtype: fp8_e4m3 here, fp8_e4m3fnuz at the peer (incompatible)" in schema.compare(fnuz).explain()


def test_a_window_counts_where_vllm_gives_pages_back_only() -> None:
    """With ``--disable-hybrid-kv-cache-manager`` windows stand beside layers that look at everything."""
    assert sliding_window(replace(SPEC, sliding_window=8)) == 0
    shape: dict[str, Any] = {"block_size": PAGE, "num_kv_heads": 2, "head_size": DIM, "dtype": torch.bfloat16}
    windowed = SlidingWindowSpec(sliding_window=8, **shape)
    assert sliding_window(windowed) == 8
    several = UniformTypeKVCacheSpecs.from_specs({"a": windowed, "b": replace(windowed, num_kv_heads=4)})
    assert sliding_window(several) == 8 and not recurrent(several)


def test_layers_whose_pages_lie_at_other_distances_only_go_as_they_are() -> None:
    wide = torch.zeros((BLOCKS, 2, 2, PAGE, 2 * DIM), dtype=torch.bfloat16)
    groups, made = cache_config(({"l0": SPEC, "l1": SPEC}, SPEC)), vllm_config()
    view = vllm_caches({"l0": tensor(0), "l1": wide[:, 0]}, made, groups).view
    assert len(view.groups) == 1 and view.groups[0].canonical == ()


def test_a_worker_without_a_layer_of_a_group_has_no_group_for_it() -> None:
    """A pipeline stage holds some layers; vLLM leaves the others' group without any."""
    caches, _ = described({"l0": SPEC}, "auto")
    assert caches.tables == (0,)
    groups = cache_config(KVCacheGroupSpec([], SPEC), ({"l0": SPEC}, SPEC))
    found = vllm_caches({"l0": tensor(0)}, vllm_config(), groups)
    assert found.tables == (1,)


def test_bytes_of_a_latent_page_are_those_of_its_tokens() -> None:
    caches, _ = described({"l0": LATENT})
    (plane,) = caches.view.groups[0].layers[0].planes
    assert plane.schema.page_bytes == PAGE * 96 * 2
    assert plane.addresses(np.array([1]))[0] - plane.addresses(np.array([0]))[0] == PAGE * 96 * 2
