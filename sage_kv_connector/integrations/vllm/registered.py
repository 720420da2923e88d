# SPDX-License-Identifier: Apache-2.0
"""A worker's transport over vLLM's caches, from when they are registered until they are given up.

Caches that vLLM discards (sleep) end all of it: engine, sessions, registrations. What is made when they are back is
another engine under the same id, so that nothing of before can reach the new memory.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import msgspec

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.devices.runtime import DeviceMemory
from sage_kv_connector.engine import EngineCore, TransferAudit, enabled_backends
from sage_kv_connector.integrations.common.accelerator import (
    check_options,
    compute_events,
    device_of,
    open_device,
)
from sage_kv_connector.integrations.common.prefill_ranks import DecodeRank
from sage_kv_connector.integrations.vllm.block_tables import BlockTables
from sage_kv_connector.integrations.vllm.cache_schema import cache_schema, weights_of
from sage_kv_connector.integrations.vllm.completions import NOTHING, Completions, StepResults
from sage_kv_connector.integrations.vllm.decode import DecodeHalf
from sage_kv_connector.integrations.vllm.kv_caches import vllm_caches
from sage_kv_connector.integrations.vllm.metadata import SageKVConnectorMetadata
from sage_kv_connector.integrations.vllm.prefill import PrefillHalf
from sage_kv_connector.integrations.vllm.prefill_directory import PrefillDirectory
from sage_kv_connector.telemetry.recording.snapshot import Sample

logger = logging.getLogger(__name__)


class Place(NamedTuple):
    """Which worker of which engine this is, and how it was configured."""

    vllm_config: Any
    kv_cache_config: Any
    config: KVTransportConfig
    engine_id: str
    tp_rank: int
    stage: int
    stages: int

    @property
    def tp_size(self) -> int:
        return int(self.vllm_config.parallel_config.tensor_parallel_size)

    @property
    def rank(self) -> int:
        return self.stage * self.tp_size + self.tp_rank

    def weights(self, version: str) -> str:
        return weights_of(self.vllm_config, version) if self.config.same_weights else ""


class Registered:
    """``schema`` is as if in host memory. ``device``: torch's, None for host memory."""

    def __init__(
        self, place: Place, kv_caches: dict[str, Any], weights: str, results: Completions, memory: Memory
    ) -> None:
        """Start the transport over these tensors. Raises ValueError naming what can't be transferred."""
        config, vllm_config = place.config, place.vllm_config
        self.device = memory.device
        caches = vllm_caches(kv_caches, vllm_config, place.kv_cache_config)
        view = caches.view
        self._tables = BlockTables(caches.tables)
        self._place = place
        self.schema = cache_schema(
            view,
            vllm_config,
            place.kv_cache_config,
            place.tp_rank,
            place.stage,
            place.weights(weights),
        )
        directory = PrefillDirectory(
            DecodeRank(place.tp_rank, place.tp_size, self.schema.total_kv_heads, place.stage, place.stages),
            enabled_backends(config, on_device=self.device is not None),
            config.connect_timeout_s,
        )
        audit = TransferAudit(config.audit_file, place.rank)
        audit.describe(view, self.schema)
        self.core = EngineCore(
            config,
            engine_id=place.engine_id,
            rank=place.rank,
            schema=self._described(),
            device=memory.opened,
        )
        self.core.register_memory(view.extents())
        computed = None if self.device is None else compute_events(self.device)
        self.prefill = PrefillHalf(self.core, view, results, audit, computed)
        self.decode = DecodeHalf(self.core, view, config, directory, results, audit)
        self.core.also_counted = self._held
        self.core.start()
        logger.info(
            "sage_kvt rank %d listens on %s; %.0f bytes of KV a token, schema %s",
            place.rank,
            ", ".join(self.core.addresses),
            self.schema.bytes_per_token(),
            self.schema.digest(),
        )

    def begin_step(self, orders: SageKVConnectorMetadata) -> StepResults:
        """Before the forward pass; returns what was given up."""
        if orders.unpaired:
            self.core.recorder.unpaired(orders.unpaired)
        given_up = self._void(orders)
        self.prefill.give_up(orders.given_up)
        by_group = self._tables.by_group(orders)
        self.prefill.begin_step(by_group.offers, by_group.progress)
        for finished in by_group.finished:
            self.prefill.finish(finished)
        self.decode.begin_step(by_group)
        return given_up

    def give_up(self, why: str) -> StepResults:
        """End every transfer. When it returns nothing reads or writes the caches."""
        self.prefill.void(why)
        return self.decode.void(why)

    @property
    def state(self) -> tuple[int, ...]:
        """Transfers that ended so far, loads and offers that are open."""
        return self.core.recorder.ended_transfers, len(self.decode), len(self.prefill)

    def _held(self) -> tuple[Sample, ...]:
        return (
            Sample("loads", (), len(self.decode)),
            Sample("on_offer", (), len(self.prefill)),
        )

    def close(self) -> None:
        """No memory is registered, and nobody listens any more."""
        self.prefill.close()
        self.decode.close()
        self.core.close()

    def _void(self, orders: SageKVConnectorMetadata) -> StepResults:
        if orders.weights:
            why = f"the weights were replaced (version {orders.weights})"
            self.prefill.void(why, again={offered.transfer_id for offered in orders.offers})
            given_up = self.decode.void(why)
            weights = self._place.weights(orders.weights)
            self.schema = msgspec.structs.replace(self.schema, weights=weights)
            self.core.describe(self._described())
            return given_up
        if orders.void:
            self.prefill.void(orders.void, only_finished=True)
            return self.decode.void(orders.void)
        return NOTHING

    def _described(self) -> KVCacheSchema:
        """What peers hear."""
        if self.device is None:
            return self.schema
        return msgspec.structs.replace(self.schema, memory="device")


class Memory:
    """What vLLM's caches lie on; opened once, since a device stays when its memory goes."""

    def __init__(self, kv_caches: dict[str, Any], config: KVTransportConfig) -> None:
        """Raises ValueError for memory that can't be used."""
        self.device = device_of([tensor for cache in kv_caches.values() for tensor in _tensors(cache)])
        check_options(self.device, config)
        self.opened: DeviceMemory | None = None if self.device is None else open_device(self.device)


def _tensors(cache: Any) -> list[Any]:
    """The tensors of one layer."""
    return list(cache) if isinstance(cache, tuple | list) else [cache]
