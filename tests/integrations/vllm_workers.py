# SPDX-License-Identifier: Apache-2.0
"""Workers of vLLM servers in this process: the real worker's side over real engines, with caches of plain tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.distributed import parallel_state
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.prompt import Prompt
from sage_kv_connector.engine import GroupPages, index_runs
from sage_kv_connector.integrations.common.prefill_ranks import PrefillEngine, ranks_of
from sage_kv_connector.integrations.vllm.completions import NOTHING, StepResults
from sage_kv_connector.integrations.vllm.metadata import (
    VLLM_HOLDS,
    Finished,
    Load,
    Offered,
    Progress,
    SageKVConnectorMetadata,
)
from sage_kv_connector.integrations.vllm.remote_prefill import RemotePrefill
from sage_kv_connector.integrations.vllm.stats import REPORTED_EVERY_S
from sage_kv_connector.integrations.vllm.worker import WorkerSide
from sage_kv_connector.telemetry.reading.growth import Growth, key_of

BLOCKS, PAGE, HEADS, DIM, LAYERS = 8, 16, 2, 32, 2
TOKENS = 3 * PAGE
SPEC = FullAttentionSpec(block_size=PAGE, num_kv_heads=HEADS, head_size=DIM, dtype=torch.bfloat16)


def vllm_config(**more: Any) -> Any:
    """As much of a VllmConfig as a worker reads; ``cache_dtype``, ``heads``, ``tp`` and ``attention`` may be given."""
    model = SimpleNamespace(
        model="a-model",
        dtype=torch.bfloat16,
        get_total_num_kv_heads=lambda: more.get("heads", HEADS),
        get_total_num_hidden_layers=lambda: LAYERS,
    )
    return SimpleNamespace(
        model_config=model,
        cache_config=SimpleNamespace(cache_dtype=more.get("cache_dtype", "auto"), block_size=PAGE),
        compilation_config=SimpleNamespace(static_forward_context=more.get("attention", {})),
        parallel_config=SimpleNamespace(tensor_parallel_size=more.get("tp", 1), pipeline_parallel_size=1),
        load_config=SimpleNamespace(load_format="dummy"),
    )


def cache_config(*groups: tuple[dict[str, Any], Any] | KVCacheGroupSpec) -> KVCacheConfig:
    """Each group from (layers, spec of the group)."""
    made = [
        one if isinstance(one, KVCacheGroupSpec) else KVCacheGroupSpec(list(one[0]), one[1]) for one in groups
    ]
    return KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=made)


def tensor(seed: int, spec: Any = SPEC) -> torch.Tensor:
    """A layer's cache as vLLM 0.32 makes it, [blocks, heads, tokens, content], of random bytes."""
    item = torch.empty((), dtype=spec.dtype).element_size()
    shape = (BLOCKS, spec.num_heads, spec.num_states, spec.state_content_size_bytes)
    raw = np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)
    assert shape[-1] % item == 0
    return torch.from_numpy(raw).view(spec.dtype)


class Worker:
    """One worker. ``step`` is a step of its engine."""

    def __init__(self, name: str, seed: int, backend: str, **more: Any) -> None:
        specs: dict[str, Any] = more.pop("specs", None) or {f"l{i}": SPEC for i in range(LAYERS)}
        groups = more.pop("groups", None) or cache_config((specs, SPEC))
        options = {"backend": backend, "unmatched_timeout_s": 5, "lease_s": 5, **more.pop("options", {})}
        config = KVTransportConfig.load(options)
        with _one_rank():
            self.side = WorkerSide(vllm_config(**more), groups, config, name)
        self.name = name
        self.told = Growth()
        self.caches = self.made(specs, seed)
        self.side.register_kv_caches(self.given())

    def made(self, specs: dict[str, Any], seed: int) -> dict[str, Any]:
        """The layers' caches, of bytes that the seed tells."""
        return {layer: tensor(seed + i, spec) for i, (layer, spec) in enumerate(specs.items())}

    def given(self) -> dict[str, Any]:
        """What vLLM registers."""
        return self.caches

    def prefill(self) -> PrefillEngine:
        _, _, _, addresses, node = self.side.registered()
        return PrefillEngine(ranks_of(self.name, {0: addresses}, node))

    def step(self, *, forward: bool = True, **orders: Any) -> StepResults:
        self.side.begin_step(SageKVConnectorMetadata(**orders))
        for layer in self.caches if forward else ():
            self.side.layer_saved(layer)
        if forward:
            self.side.end_forward()
        return self.side.take_results(idle=not forward)

    def until(self, enough: Callable[[StepResults], bool], first: StepResults = NOTHING) -> StepResults:
        """Empty steps until their results, and those of the ``first``, are ``enough``."""
        end, results = time.monotonic() + 10.0, first
        while not enough(results):
            assert time.monotonic() < end, f"only {results}"
            results = results.and_also(self.step(forward=False))
        return results

    def counted(self, metric: str, label: str) -> float:
        """What an API server shows of it: the sum of a counter's series with this label, over all its transports."""
        time.sleep(REPORTED_EVERY_S)
        report = self.side.report()
        if report is not None:
            self.told.add(report.growth())
        keys = {key_of(text): value for text, value in self.told.grown.items()}
        return sum(value for key, value in keys.items() if key.metric == metric and label in key.labels)

    def moved(self, direction: str) -> float:
        """Bytes of KV that went over its links."""
        return self.counted("link_bytes_total", direction)

    def pages(self, ids: list[int]) -> list[bytes]:
        return [bytes(one[ids].contiguous().view(torch.uint8).numpy()) for one in self.caches.values()]

    def close(self) -> None:
        self.side.shutdown()


@contextmanager
def _one_rank() -> Iterator[None]:
    """vLLM's groups of processes, of one."""
    kept = parallel_state.get_tensor_model_parallel_rank, parallel_state.get_pp_group
    parallel_state.get_tensor_model_parallel_rank = lambda: 0
    parallel_state.get_pp_group = lambda: SimpleNamespace(rank_in_group=0, world_size=1)
    try:
        yield
    finally:
        parallel_state.get_tensor_model_parallel_rank, parallel_state.get_pp_group = kept


def prompt(name: str) -> Prompt:
    """Each transfer's own."""
    return Prompt([ord(name[i % len(name)]) for i in range(TOKENS)])


def offered(name: str) -> Offered:
    return Offered(f"p-{name}", name, "", prompt(name), False)


def progress(name: str, ids: tuple[int, ...], tokens: int, tables: int = 1) -> Progress:
    return Progress(f"p-{name}", name, (ids,) * tables, tokens, tokens == TOKENS)


def finished(name: str, ids: tuple[int, ...], tables: int = 1, hold: int = VLLM_HOLDS) -> Finished:
    return Finished(f"p-{name}", name, (ids,) * tables, TOKENS, hold)


def load(prefill: PrefillEngine, name: str, ids: list[int], *, done: bool = True, tables: int = 1) -> Load:
    runs = index_runs(list(range(len(ids))))
    pages = tuple(
        GroupPages(table, runs, np.array(ids), range(0, len(ids) * PAGE)) for table in range(tables)
    )
    return Load(f"d-{name}", RemotePrefill(name, prefill, "", done), pages, prompt(name).whole)


def handed_over(
    prefill: Worker,
    decode: Worker,
    name: str,
    source: list[int],
    target: list[int],
    *,
    on_offer: bool = False,
) -> bool:
    """Prefill computes and finishes, decode fetches: whether it arrived, byte for byte."""
    ids = tuple(source)
    tables = len(prefill.side._place.kv_cache_config.kv_cache_groups)
    offers = [] if on_offer else [offered(name)]
    prefill.step(offers=offers, progress=[progress(name, ids, TOKENS, tables)])
    sent = prefill.step(finished=[finished(name, ids, tables)])
    first = decode.step(loads=[load(prefill.prefill(), name, target, tables=tables)])
    results = decode.until(lambda one: f"d-{name}" in one.received, first)
    if results.failed:
        return False
    prefill.until(lambda one: f"p-{name}" in one.sent, sent)
    return prefill.pages(source) == decode.pages(target)
