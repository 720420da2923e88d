# SPDX-License-Identifier: Apache-2.0
"""The HiCache backend against SGLang's own host pools and factory: every call of its interface.

Runs in SGLang's own environment (``make test-sglang``), with the shims of ``cli/sglang_on_cpu``. What
real servers call is run in ``test_hicache.py``; pools beside KV (``v2``) are only tried here.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from sage_kv_connector.launch.sglang import ON_CPU
from sage_kv_connector.launch.store import StoreProcess, store_process

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None, reason="runs in SGLang's environment"
)

LAYERS, PAGE, HEADS, DIM, TOKENS = 3, 4, 2, 8, 64
LAYOUTS = ["layer_first", "page_first", "page_first_direct"]


@pytest.fixture(scope="module", autouse=True)
def on_cpu() -> None:
    sys.path.insert(0, str(ON_CPU))
    spec = importlib.util.spec_from_file_location("sglang_on_cpu", ON_CPU / "sitecustomize.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.fixture(scope="module")
def store() -> Iterator[StoreProcess]:
    with store_process("64MiB") as process:
        yield process


def host_pool(layout: str, seed: int | None = None, heads: int = HEADS) -> Any:
    """A real pool of 64 tokens, bf16, with random pages or zeros."""
    import torch
    from sglang.srt.mem_cache.device_pool_info import KVBufferLayout, KVBuffers, MHABufferInfo
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

    planes = [torch.zeros(TOKENS, heads, DIM, dtype=torch.bfloat16) for _ in range(2 * LAYERS)]
    pointers = torch.zeros(LAYERS, dtype=torch.uint64)
    buffers = KVBuffers(
        k=tuple(planes[:LAYERS]), v=tuple(planes[LAYERS:]), k_data_ptrs=pointers, v_data_ptrs=pointers,
        layout=KVBufferLayout.NHD,
    )  # fmt: skip
    info = MHABufferInfo(
        buffers=buffers, page_size=PAGE, head_num=heads, head_dim=DIM, v_head_dim=DIM, dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )  # fmt: skip
    pool = MHATokenToKVPoolHost(
        info, 2.0, 0, PAGE, layout, pin_memory=False, device_capacity_tokens=TOKENS, start_layer=0, end_layer=LAYERS
    )  # fmt: skip
    pool.kv_buffer.zero_()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        pool.kv_buffer.copy_(torch.rand(pool.kv_buffer.shape, generator=generator))
    return pool


MakeBackend = Callable[..., Any]


@pytest.fixture
def make_backend(store: StoreProcess) -> Iterator[MakeBackend]:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
    from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

    made: list[Any] = []

    def make(pool: Any, *, model: str = "model", zero_copy: bool = True, **rank: Any) -> Any:
        extra = {
            "backend_name": "sage_kvt",
            "module_path": "sage_kv_connector.integrations.sglang.hicache",
            "class_name": "SageKVHiCache",
            "interface_v1": int(zero_copy),
            "address": store.address("tcp"),
            "transport": {"host": "127.0.0.1"},
        }
        config = HiCacheStorageConfig(
            **{
                "tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0, "attn_cp_size": 1,
                "is_mla_model": False, "enable_storage_metrics": False, "is_page_first_layout": False,
                "model_name": model, "extra_config": extra, **rank,
            }
        )  # fmt: skip
        backend = StorageBackendFactory.create_backend("dynamic", config, pool)
        made.append(backend)
        backend.register_mem_pool_host(pool)
        backend.register_mem_host_pool_v2(pool, "kv")
        backend.on_host_pools_registered()
        return backend

    yield make
    for backend in made:
        backend.clear()
        backend.close()


def indices(*pages: int) -> Any:
    import torch

    return torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in pages])


def page(pool: Any, number: int) -> list[float]:
    values: list[float] = pool.get_data_page(number * PAGE).float().tolist()
    return values


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_go_from_one_pool_to_another(make_backend: MakeBackend, layout: str) -> None:
    source, target = host_pool(layout, seed=1), host_pool(layout)
    writer, reader = make_backend(source), make_backend(target)
    keys = ["h0", "h1", "h2"]
    assert reader.batch_exists(keys) == 0
    assert writer.batch_set_v1(keys, indices(5, 0, 9)) == [True] * 3
    assert reader.batch_exists([*keys, "h3"]) == 3 and reader.batch_exists(["h3", *keys]) == 0
    assert reader.exists("h1") and not reader.exists("h3")
    assert reader.batch_get_v1(["h2", "h0", "h7"], indices(1, 2, 3)) == [True, True, False]
    assert page(target, 1) == page(source, 9) and page(target, 2) == page(source, 5)
    assert not any(page(target, 3)) and not any(page(target, 0)), "nothing else is written"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flat_copies_go_the_same_way(make_backend: MakeBackend, layout: str) -> None:
    """What SGLang calls without ``interface_v1``."""
    source, target = host_pool(layout, seed=2), host_pool(layout)
    writer, reader = (make_backend(pool, zero_copy=False) for pool in (source, target))
    flat = [source.get_data_page(number * PAGE) for number in (3, 4)]
    assert writer.batch_set(["f0", "f1"], flat)
    assert reader.batch_exists(["f0", "f1", "f2"]) == 2
    got = reader.batch_get(["f1", "f2", "f0"], [target.get_dummy_flat_data_page() for _ in range(3)])
    assert got[1] is None
    target.set_from_flat_data_page(0, got[0])
    target.set_from_flat_data_page(PAGE, got[2])
    assert page(target, 0) == page(source, 4) and page(target, 1) == page(source, 3)
    assert (
        writer.set("f3", flat[0])
        and reader.get("f3", target.get_dummy_flat_data_page()).tolist() == flat[0].tolist()
    )
    assert reader.get("f9", target.get_dummy_flat_data_page()) is None
    assert not writer.set("f4", None) and not writer.batch_set(["f4", "f5"], flat[:1])


def test_zero_copy_and_flat_pages_are_never_mixed(make_backend: MakeBackend) -> None:
    pool = host_pool("layer_first", seed=3)
    pages, flat = make_backend(pool), make_backend(pool, zero_copy=False)
    assert pages.batch_set_v1(["m"], indices(1)) == [True]
    assert not flat.exists("m") and flat.get("m", pool.get_dummy_flat_data_page()) is None


@pytest.mark.parametrize(
    "other", [{"model": "other"}, {"tp_rank": 1, "tp_size": 2}, {"pp_rank": 1, "pp_size": 2}]
)
def test_others_do_not_see_them_nor_clear_them(make_backend: MakeBackend, other: dict[str, Any]) -> None:
    pool = host_pool("page_first", seed=4)
    mine, theirs = make_backend(pool), make_backend(pool, **other)
    assert mine.batch_set_v1(["k"], indices(0)) == [True]
    assert theirs.batch_exists(["k"]) == 0
    theirs.clear()
    assert mine.batch_exists(["k"]) == 1
    mine.clear()
    assert mine.batch_exists(["k"]) == 0


def test_pages_of_replaced_weights_are_neither_found_nor_kept(
    make_backend: MakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until its cache is flushed, SGLang's storage threads hold KV of the weights before; a flush starts new ones."""
    from sage_kv_connector.integrations.sglang import hicache

    backend = make_backend(host_pool("page_first", seed=9))
    with ThreadPoolExecutor(1) as before:
        assert before.submit(backend.batch_set_v1, ["replaced"], indices(0)).result() == [True]
        monkeypatch.setattr(hicache, "own_weights", lambda: "of version 7")
        backend._weights_replaced("7")
        assert before.submit(backend.batch_exists, ["replaced"]).result() == 0
        assert before.submit(backend.batch_set_v1, ["replaced"], indices(0)).result() == [False]
        assert before.submit(backend.batch_get_v1, ["replaced"], indices(1)).result() == [False]
    with ThreadPoolExecutor(1) as after:
        assert after.submit(backend.batch_exists, ["replaced"]).result() == 0
        assert after.submit(backend.batch_set_v1, ["replaced"], indices(1)).result() == [True]
        assert after.submit(backend.batch_exists, ["replaced"]).result() == 1


def test_another_layout_or_shape_does_not_see_them(make_backend: MakeBackend) -> None:
    assert make_backend(host_pool("layer_first", seed=5)).batch_set_v1(["k"], indices(0)) == [True]
    assert make_backend(host_pool("page_first")).batch_exists(["k"]) == 0
    assert make_backend(host_pool("layer_first", heads=4)).batch_exists(["k"]) == 0
    assert make_backend(host_pool("layer_first")).batch_exists(["k"]) == 1


def test_indices_of_another_number_of_pages_are_misses(make_backend: MakeBackend) -> None:
    backend = make_backend(host_pool("page_first", seed=6))
    assert backend.batch_set_v1(["a", "b"], indices(0)) == [False, False]
    assert backend.batch_get_v1(["a"], None) == [False]


def test_pools_beside_kv_have_pages_of_their_own(make_backend: MakeBackend) -> None:
    from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer

    kv, state = host_pool("page_first", seed=7), host_pool("page_first", seed=8, heads=1)
    backend = make_backend(kv)
    backend.register_mem_host_pool_v2(state, PoolName.MAMBA)
    keys = [f"v{i}" for i in range(5)]
    assert backend.batch_set_v1(keys, indices(0, 1, 2, 3, 4)) == [True] * 5
    some = PoolTransfer(name=PoolName.MAMBA, host_indices=indices(6, 7, 8), keys=[keys[0], keys[1], keys[3]])
    assert backend.batch_set_v2([some]) == {PoolName.MAMBA: [True] * 3}

    def query(policy: PoolHitPolicy, trailing: int = 1) -> Any:
        wanted = PoolTransfer(name=PoolName.MAMBA, keys=keys[-trailing:], hit_policy=policy)
        return backend.batch_exists_v2([*keys, "v9"], [wanted])

    every = query(PoolHitPolicy.ALL_PAGES)
    assert every.kv_hit_pages == 2 and every.extra_pool_hit_pages == {PoolName.KV: 5, PoolName.MAMBA: 2}
    last = query(PoolHitPolicy.TRAILING_PAGES)
    assert last.kv_hit_pages == 4 and last.restorable_prefix_pages == [1, 2, 4]
    last_two = query(PoolHitPolicy.TRAILING_PAGES, 2)
    assert last_two.kv_hit_pages == 2 and last_two.restorable_prefix_pages == [1, 2]
    with pytest.raises(ValueError, match="hit_policy"):
        query(PoolHitPolicy.BLOCK_GROUPS)
    assert backend.batch_exists_v2([*keys, "v9"]).kv_hit_pages == 5

    before = page(state, 6)
    state.kv_buffer.zero_()
    fetched = PoolTransfer(name=PoolName.MAMBA, host_indices=indices(1, 2), keys=[keys[0], keys[2]])
    assert backend.batch_get_v2([fetched]) == {PoolName.MAMBA: [True, False]}
    assert page(state, 1) == before
    unknown = PoolTransfer(name=PoolName.SWA, host_indices=indices(0), keys=["x"])
    assert backend.batch_get_v2([unknown]) == {PoolName.SWA: [False]}


def test_a_pool_without_addresses_and_bad_options_are_named(make_backend: MakeBackend) -> None:
    backend = make_backend(host_pool("page_first"))

    class Unaddressed:
        page_size, layout, kv_buffer = PAGE, "page_unified", None

        def get_page_buffer_meta(self, indices: Any) -> Any:
            raise ValueError(f"Unsupported layout: {self.layout}")

    with pytest.raises(ValueError, match=r"page_unified.*tells no addresses of its pages"):
        backend.register_mem_pool_host(Unaddressed())
    backend._storage_config.extra_config["adress"] = "x"
    with pytest.raises(ValueError, match="extra config has adress"):
        type(backend)(backend._storage_config, {})
