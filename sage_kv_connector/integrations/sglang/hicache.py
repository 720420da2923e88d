# SPDX-License-Identifier: Apache-2.0
"""SGLang's HiCache with a store of ours as its storage (``--hicache-storage-backend dynamic``).

With ``interface_v1`` pages go straight from and to SGLang's host pool; without it SGLang hands out
flat copies, which go through a buffer. Whatever the store does, SGLang sees a hit or a miss.
Interfaces: ``mem_cache/hicache_storage.py`` and ``managers/cache_controller.py`` of SGLang 0.5.23.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    PoolHitPolicy,
    PoolName,
    PoolTransferResult,
)

from sage_kv_connector.backends.base import Segments
from sage_kv_connector.integrations.sglang.hicache_keys import page_namespace
from sage_kv_connector.integrations.sglang.hicache_options import HiCacheOptions
from sage_kv_connector.integrations.sglang.weights import follow_weights, own_weights
from sage_kv_connector.store.bounce import Bounce, Bytes
from sage_kv_connector.store.client import StoreClient

logger = logging.getLogger(__name__)

_Move = Callable[[Sequence[str], Sequence[Segments]], list[bool]]


class _Pool:
    """One of SGLang's host pools: where its pages lie, and what their keys begin with (``prefix``).

    Flat copies of pages may be in another order than their pieces: ``flat_prefix``.
    """

    def __init__(self, pool: Any, name: str, storage_config: Any, namespace: str, weights: str) -> None:
        """Raises ValueError for a pool whose pages have no addresses."""
        self._pool = pool
        self.page_size = int(getattr(pool, "page_size", 1) or 1)
        try:
            pointers, sizes = pool.get_page_buffer_meta(torch.arange(self.page_size))
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
            raise ValueError(
                f"host pool {name} ({type(pool).__name__}, layout {getattr(pool, 'layout', None)!r}) tells no "
                f"addresses of its pages, which sage_kvt needs: {error}"
            ) from error
        self._pieces = tuple(int(size) for size in sizes)
        spans = self.extents()
        if not all(
            any(start <= at and at + size <= start + length for start, length in spans)
            for at, size in zip(pointers, sizes, strict=True)
        ):
            raise ValueError(f"host pool {name} ({type(pool).__name__}) names pages outside of its buffers")
        self._name = name
        self._digest = partial(page_namespace, storage_config, pool, self._pieces, namespace)
        self.holds_kv_of(weights)

    def holds_kv_of(self, weights: str) -> None:
        """From now on the pool's pages are KV of these weights."""
        digest = self._digest(weights)
        self.prefix, self.flat_prefix = f"{digest}:{self._name}:", f"{digest}:{self._name}.flat:"

    def segments(self, host_indices: torch.Tensor, pages: int) -> Sequence[Segments] | None:
        """Segments of each page, or None where SGLang's indices are not those of so many pages."""
        if host_indices is None or host_indices.numel() != pages * self.page_size:
            return None
        pointers, sizes = self._pool.get_page_buffer_meta(host_indices)
        table = np.array([pointers, sizes], dtype=np.uint64).T
        if table.shape != (pages * len(self._pieces), 2):
            return None
        return list(table.reshape(pages, len(self._pieces), 2))

    def extents(self) -> set[tuple[int, int]]:
        """(address, length) of all memory that pages may lie in."""
        getter = getattr(self._pool, "get_hybrid_pool_buffer", None)
        tensors = list(_tensors(getattr(self._pool, "kv_buffer", None)))
        tensors += _tensors(getter() if getter is not None else None)
        storages = [tensor.untyped_storage() for tensor in tensors]
        return {(storage.data_ptr(), storage.nbytes()) for storage in storages if storage.nbytes()}


class SageKVHiCache(HiCacheStorage):  # type: ignore[misc]
    """The storage backend; SGLang makes one for each scheduler rank and calls it from several threads."""

    def __init__(self, storage_config: Any, _: Any = None) -> None:
        """Raises ValueError for bad options. A store that can't be reached is no error: its pages are misses."""
        options = HiCacheOptions.load(storage_config.extra_config)
        self._storage_config = storage_config
        self._namespace = options.namespace
        self._weights = own_weights() if options.transport.same_weights else ""
        self._client = StoreClient(options.addresses, options.transport, deadline_s=options.deadline_s)
        self._bounce: Bounce | None = None
        self._bounce_lock = threading.Lock()
        self._pools: dict[str, _Pool] = {}
        self._registered: set[tuple[int, int]] = set()
        self._with_old_kv: WeakSet[threading.Thread] = WeakSet()
        if options.transport.same_weights:
            follow_weights(self._weights_replaced)
        if not storage_config.extra_config.get("interface_v1"):
            logger.info("sage_kvt: pages are copied on their way; set interface_v1 to 1 in the extra config")

    def _weights_replaced(self, version: str) -> None:
        """SGLang's scheduler thread: keys are another's from now on.

        What SGLang's storage threads hold is KV of the weights before until the cache is flushed, which starts other
        threads; theirs is neither kept nor looked for any more.
        """
        self._with_old_kv = WeakSet(set(threading.enumerate()) - {threading.current_thread()})
        self._weights = own_weights()
        for pool in self._pools.values():
            pool.holds_kv_of(self._weights)
        logger.info("sage_kvt: the weights were replaced (version %s), keys begin anew", version)

    # -- SGLang's pools

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        super().register_mem_pool_host(mem_pool_host)
        self._register(mem_pool_host, PoolName.KV)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self._register(host_pool, host_pool_name)

    def _register(self, host_pool: Any, name: Any) -> None:
        pool = _Pool(host_pool, str(name), self._storage_config, self._namespace, self._weights)
        fresh = pool.extents() - self._registered
        self._client.register_memory(sorted(fresh))
        self._registered |= fresh
        self._pools[str(name)] = pool

    # -- pages by their place in the host pool

    def batch_set_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        return self._move(PoolName.KV, keys, host_indices, self._client.put)

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        return self._move(PoolName.KV, keys, host_indices, self._client.get)

    def batch_set_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        return {t.name: self._move(t.name, t.keys or [], t.host_indices, self._client.put) for t in transfers}

    def batch_get_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        return {t.name: self._move(t.name, t.keys or [], t.host_indices, self._client.get) for t in transfers}

    def _move(self, name: Any, keys: Sequence[str], host_indices: Any, move: _Move) -> list[bool]:
        pool = self._pools.get(str(name))
        items = None if pool is None else pool.segments(host_indices, len(keys))
        if pool is None or items is None:
            logger.error(
                "sage_kvt: pool %s is not registered, or indices are not of %d pages", name, len(keys)
            )
            return [False] * len(keys)
        if threading.current_thread() in self._with_old_kv:
            return [False] * len(keys)
        return move([pool.prefix + key for key in keys], items)

    # -- which pages are there

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """How many from the first on are there, one after the other."""
        return _leading(self._held(PoolName.KV, keys))

    def batch_exists_v2(
        self, keys: list[str], pool_transfers: list[Any] | None = None, extra_info: Any = None
    ) -> Any:
        """Prefixes of the KV pages that every pool can restore; raises ValueError for a policy that is not known."""
        kv_pages = self.batch_exists(keys, extra_info)
        reported = {PoolName.KV: kv_pages}
        usable = set(range(1, kv_pages + 1))
        for transfer in pool_transfers or []:
            there = self._held(transfer.name, keys[:kv_pages])
            if transfer.hit_policy == PoolHitPolicy.ALL_PAGES:
                window = kv_pages
            elif transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES:
                window = max(1, len(transfer.keys or []))
            else:
                raise ValueError(
                    f"hit_policy is {transfer.hit_policy}, sage_kvt knows all_pages and trailing_pages"
                )
            ends = {end for end in range(1, kv_pages + 1) if all(there[max(0, end - window) : end])}
            reported[transfer.name] = max(ends, default=0)
            usable &= ends
        hits = {name: pages for name, pages in reported.items() if pages}
        return PoolTransferResult(max(usable, default=0), hits, sorted(usable))

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def _held(self, name: Any, keys: Sequence[str]) -> list[bool]:
        pool = self._pools.get(str(name))
        if pool is None or not keys or threading.current_thread() in self._with_old_kv:
            return [False] * len(keys)
        prefix = pool.prefix if self._storage_config.extra_config.get("interface_v1") else pool.flat_prefix
        return self._client.held([prefix + key for key in keys])

    # -- flat copies of pages

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        return self.batch_set([key], [value])

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Whether all are kept now; ``values`` are contiguous tensors in host memory."""
        arrays = [None if value is None else _flat_bytes(value) for value in values or []]
        if len(arrays) != len(keys) or any(array is None for array in arrays):
            logger.error("sage_kvt: batch_set wants a contiguous host tensor for each key")
            return False
        if threading.current_thread() in self._with_old_kv:
            return False
        return all(
            self._copies().put(self._flat_keys(keys), [array for array in arrays if array is not None])
        )

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> torch.Tensor | None:
        return self.batch_get([key], [target_location])[0]

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        """The given tensors, each filled with its page, or None in its place."""
        targets = list(target_locations or [])
        arrays = [None if target is None else _flat_bytes(target) for target in targets]
        if len(arrays) != len(keys) or any(array is None for array in arrays):
            logger.error("sage_kvt: batch_get wants a contiguous host tensor for each key")
            return [None] * len(keys)
        if threading.current_thread() in self._with_old_kv:
            return [None] * len(keys)
        landed = self._copies().get(self._flat_keys(keys), [array for array in arrays if array is not None])
        return [target if flag else None for target, flag in zip(targets, landed, strict=True)]

    def _flat_keys(self, keys: Sequence[str]) -> list[str]:
        prefix = self._pools[PoolName.KV].flat_prefix
        return [prefix + key for key in keys]

    def _copies(self) -> Bounce:
        with self._bounce_lock:
            if self._bounce is None:
                self._bounce = Bounce(self._client)
            return self._bounce

    # -- all of it

    def clear(self) -> None:
        """Remove what this rank's keys name; other models' pages stay."""
        for pool in self._pools.values():
            self._client.clear(pool.prefix)
            self._client.clear(pool.flat_prefix)

    def close(self) -> None:
        self._client.close()


def _leading(flags: Sequence[bool]) -> int:
    return next((index for index, flag in enumerate(flags) if not flag), len(flags))


def _tensors(found: Any) -> Iterable[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, list | tuple):
        for one in found:
            yield from _tensors(one)


def _flat_bytes(tensor: Any) -> Bytes | None:
    """The memory of a contiguous host tensor, not a copy; None for anything else."""
    if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    flat: Bytes = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return flat
