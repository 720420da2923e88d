# SPDX-License-Identifier: Apache-2.0
"""The worker's side: carries the scheduler's orders to the transport and brings back what ended.

vLLM's thread only enqueues here. Completions come on the control thread into
``Completions``, from which each step takes them. In a step without a forward pass
(everything waits for transfers) the step waits some milliseconds for the next
completion instead of spinning.
"""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.node import node_id
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.engine import EngineCore, TransferAudit, enabled_backends
from sage_kv_connector.integrations.common.prefill_ranks import DecodeRank
from sage_kv_connector.integrations.vllm.accelerator import device_of, open_device, wait_for_compute
from sage_kv_connector.integrations.vllm.amx import request_amx_tiles
from sage_kv_connector.integrations.vllm.completions import Completions, StepResults
from sage_kv_connector.integrations.vllm.decode import DecodeHalf
from sage_kv_connector.integrations.vllm.kv_caches import cache_schema, cache_view, weights_of
from sage_kv_connector.integrations.vllm.metadata import SageKVConnectorMetadata, SageKVHandshakeMetadata
from sage_kv_connector.integrations.vllm.prefill import PrefillHalf
from sage_kv_connector.integrations.vllm.prefill_directory import PrefillDirectory
from sage_kv_connector.integrations.vllm.stats import Reports, SageKVStats, Totals

logger = logging.getLogger(__name__)

#: A step without a forward pass waits this long for a completion; new requests wait no longer for it.
#: Shorter waits cost the copy its core: between steps vLLM's worker polls its queue without sleeping.
IDLE_STEP_WAIT_S = 0.005


def _tensors(cache: Any) -> list[Any]:
    """The tensors of one layer."""
    return list(cache) if isinstance(cache, tuple | list) else [cache]


class _Registered:
    """What there is once vLLM has registered its caches. ``device``: torch's, None for host memory."""

    def __init__(
        self, core: EngineCore, schema: KVCacheSchema, prefill: PrefillHalf, decode: DecodeHalf, device: Any
    ) -> None:
        self.core = core
        self.schema = schema
        self.prefill = prefill
        self.decode = decode
        self.device = device


class WorkerSide:
    """Lives in each worker process; methods are called on vLLM's thread."""

    def __init__(
        self, vllm_config: Any, kv_cache_config: Any, config: KVTransportConfig, engine_id: str
    ) -> None:
        from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank

        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._config = config
        self._tp_rank = int(get_tensor_model_parallel_rank())
        self._tp_size = int(vllm_config.parallel_config.tensor_parallel_size)
        self._stage, self._stages = int(get_pp_group().rank_in_group), int(get_pp_group().world_size)
        self._rank = self._stage * self._tp_size + self._tp_rank
        self._engine_id = engine_id
        request_amx_tiles()
        self._results = Completions()
        self._registered: _Registered | None = None
        self._reports = Reports(self._rank)

    # -- start and end

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Make the transport over these tensors, and start it. Raises ValueError naming what can't be transferred."""
        config = self._config
        device = device_of([t for cache in kv_caches.values() for t in _tensors(cache)])
        view = cache_view(kv_caches, self._vllm_config, self._kv_cache_config)
        weights = weights_of(self._vllm_config) if config.same_weights else ""
        schema = cache_schema(
            view, self._vllm_config, self._kv_cache_config, self._tp_rank, self._stage, weights
        )
        directory = PrefillDirectory(
            DecodeRank(self._tp_rank, self._tp_size, schema.total_kv_heads, self._stage, self._stages),
            enabled_backends(config, on_device=device is not None),
            config.connect_timeout_s,
        )
        audit = TransferAudit(config.audit_file, self._rank)
        audit.describe(view, schema)
        memory, described = None, schema
        if device is not None:
            if config.audit_file is not None:
                raise ValueError(
                    f"audit_file is {str(config.audit_file)!r}, but KV lies on {device}: "
                    "only host memory can be audited"
                )
            described = msgspec.structs.replace(schema, memory="device")
            memory = open_device(device)
        core = EngineCore(config, engine_id=self._engine_id, rank=self._rank, schema=described, device=memory)
        core.register_memory(view.extents())
        prefill = PrefillHalf(core, view, self._results, audit, layered=device is None)
        decode = DecodeHalf(core, view, config, directory, self._results, audit)
        core.start()
        self._registered = _Registered(core, schema, prefill, decode, device)
        logger.info(
            "sage_kvt rank %d listens on %s; %.0f bytes of KV a token, schema %s",
            self._rank,
            ", ".join(core.addresses),
            described.bytes_per_token(),
            schema.digest(),
        )

    def handshake_metadata(self) -> SageKVHandshakeMetadata | None:
        known = self._registered
        if known is None:
            return None
        return SageKVHandshakeMetadata(known.core.addresses, node_id(), known.schema.digest())

    def registered(self) -> tuple[str, int, KVCacheSchema, tuple[str, ...], str]:
        """Engine id, rank, schema, addresses and node. Raises RuntimeError before vLLM registered its caches."""
        known = self._registered
        if known is None:
            raise RuntimeError("vLLM has not registered its KV caches yet")
        return self._engine_id, self._rank, known.schema, known.core.addresses, node_id()

    def totals(self) -> Totals:
        known = self._registered
        if known is None:
            return Totals({}, {})
        counters = known.core.counters() | {
            "loads": len(known.decode),
            "on_offer": len(known.prefill),
            "aborted_loads": known.decode.aborted,
        }
        return Totals(counters, {"failed_loads": known.decode.failed, "failed_offers": known.prefill.failed})

    def report(self) -> SageKVStats | None:
        """What changed since the last report; None if nothing did."""
        return self._reports.take(self.totals())

    def shutdown(self) -> None:
        if self._registered is not None:
            self._registered.decode.close()
            self._registered.core.close()

    # -- a step

    def withdraw(self, meta: SageKVConnectorMetadata) -> None:
        """Before pages that were given up are written again."""
        known, transfer_ids = self._registered, list(meta.withdrawn)
        meta.withdrawn.clear()
        if known is not None and transfer_ids:
            known.prefill.withdraw(transfer_ids)

    def begin_step(self, meta: SageKVConnectorMetadata) -> None:
        """Before the forward pass."""
        known = self._registered
        if known is None:
            return
        self.withdraw(meta)
        known.prefill.begin_step(meta.offers, meta.progress)
        for finished in meta.finished:
            known.prefill.finish(finished)
        known.decode.begin_step(meta)

    def layer_saved(self, layer_name: str) -> None:
        """A layer's KV of this step is written."""
        if self._registered is not None:
            self._registered.prefill.layer_saved(layer_name)

    def end_forward(self) -> None:
        """After the forward pass every layer of the step is written."""
        known = self._registered
        if known is None:
            return
        if known.device is not None and known.prefill.in_step:
            wait_for_compute(known.device)
        known.prefill.end_forward()

    def take_results(self, *, has_forward: bool) -> StepResults:
        known = self._registered
        waits = known is not None and (len(known.decode) or known.prefill.waits_for_decode)
        if not has_forward and waits:
            self._results.wait(IDLE_STEP_WAIT_S)
        sent, received = self._results.take()
        if known is None:
            return StepResults(sent, set(received), set(), set())
        return known.decode.take(sent, received)
