# SPDX-License-Identifier: Apache-2.0
"""The worker's side: carries the scheduler's orders to the transport and brings back what ended.

vLLM's thread only enqueues here. Completions come on the control thread into
``Completions``, from which each step takes them. A step that is idle (everything waits
for transfers) waits some milliseconds for the next completion instead of spinning.
"""

from __future__ import annotations

import logging
from typing import Any

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.node import node_id
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.integrations.vllm.amx import request_amx_tiles
from sage_kv_connector.integrations.vllm.cache_schema import FIRST_VERSION
from sage_kv_connector.integrations.vllm.completions import NOTHING, Completions, StepResults, not_on_offer
from sage_kv_connector.integrations.vllm.decode import not_landed
from sage_kv_connector.integrations.vllm.metadata import (
    SageKVConnectorMetadata,
    SageKVHandshakeMetadata,
    SageKVWorkerMetadata,
)
from sage_kv_connector.integrations.vllm.registered import Memory, Place, Registered
from sage_kv_connector.integrations.vllm.stats import Reports, SageKVStats
from sage_kv_connector.telemetry.recording.snapshot import Snapshot

logger = logging.getLogger(__name__)

#: An idle step waits this long for a completion; new requests wait no longer for it.
#: Shorter waits cost the copy its core: between steps vLLM's worker polls its queue without sleeping.
IDLE_STEP_WAIT_S = 0.005
#: Why KV is void that lay in caches which vLLM discards.
DISCARDED = "vLLM discards its KV cache (sleep)"


class WorkerSide:
    """Lives in each worker process; methods are called on vLLM's thread."""

    def __init__(
        self, vllm_config: Any, kv_cache_config: Any, config: KVTransportConfig, engine_id: str
    ) -> None:
        from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank

        tp_rank, stages = int(get_tensor_model_parallel_rank()), get_pp_group()
        stage = int(stages.rank_in_group)
        self._place = Place(
            vllm_config, kv_cache_config, config, engine_id, tp_rank, stage, int(stages.world_size)
        )
        request_amx_tiles()
        self._results = Completions()
        self._kv_caches: dict[str, Any] = {}
        self._memory: Memory | None = None
        self._registered: Registered | None = None
        self._weights = FIRST_VERSION
        self._given_up = NOTHING  #: what vLLM hears of it with the next results
        self._reports = Reports(self._place.rank)

    # -- start and end

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Make the transport over these tensors, and start it. Raises ValueError naming what can't be transferred."""
        self._memory = Memory(kv_caches, self._place.config)
        self._kv_caches = kv_caches
        self._register(self._memory)

    def unregister_kv_caches(self) -> None:
        """The caches are about to be discarded. When this returns nothing reads or writes them. Idempotent."""
        known, self._registered = self._registered, None
        if known is not None:
            self._given_up = self._given_up.and_also(known.give_up(DISCARDED))
            self._reports.hear(known.core.snapshot())
            known.close()
            logger.info("sage_kvt rank %d: %s", self._place.rank, DISCARDED)

    def restore_kv_caches(self) -> None:
        """They are back, empty, where they were. Idempotent."""
        if self._registered is None and self._memory is not None:
            self._register(self._memory)

    def _register(self, memory: Memory) -> None:
        self._registered = Registered(self._place, self._kv_caches, self._weights, self._results, memory)

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
        return self._place.engine_id, self._place.rank, known.schema, known.core.addresses, node_id()

    def snapshot(self) -> Snapshot | None:
        """Of the transport over the caches, if there are any."""
        return None if self._registered is None else self._registered.core.snapshot()

    def report(self) -> SageKVStats | None:
        """What changed since the last report; None if nothing did, or little and not long ago."""
        known = self._registered
        if known is not None and self._reports.due(state := known.state):
            self._reports.hear(known.core.snapshot(), state)
        return self._reports.take()

    def shutdown(self) -> None:
        if self._registered is not None:
            self._registered.close()

    # -- a step

    def withdraw(self, meta: SageKVConnectorMetadata) -> None:
        """Before pages that were given up are written again."""
        known, transfer_ids = self._registered, list(meta.withdrawn)
        meta.withdrawn.clear()
        if known is not None and transfer_ids:
            known.prefill.withdraw(transfer_ids)

    def begin_step(self, meta: SageKVConnectorMetadata) -> None:
        """Before the forward pass."""
        self.withdraw(meta)
        self._weights = meta.weights or self._weights
        known = self._registered
        if known is None:  # what needs the caches can't be done
            given_up = not_landed(meta.loads).and_also(not_on_offer(meta.finished))
        else:
            known.core.check_alive()
            given_up = known.begin_step(meta)
        self._given_up = self._given_up.and_also(given_up)

    def layer_saved(self, layer_name: str) -> None:
        """A layer's KV of this step is written."""
        if self._registered is not None:
            self._registered.prefill.layer_saved(layer_name)

    def end_forward(self) -> None:
        """After the forward pass every layer of the step is written."""
        if self._registered is not None:
            self._registered.prefill.end_forward()

    def take_results(self, *, idle: bool) -> StepResults:
        """What ended. ``idle``: wait a little for something to end, where something may."""
        known = self._registered
        waits = known is not None and (len(known.decode) or known.prefill.waits_for_decode)
        if idle and waits:
            self._results.wait(IDLE_STEP_WAIT_S)
        ended = self._results.take()
        given_up, self._given_up = self._given_up, NOTHING
        results = given_up.and_also(NOTHING._replace(sent=ended.sent, released=ended.released))
        return results if known is None else results.and_also(known.decode.take(ended.received))

    def worker_meta(self, released: set[int]) -> SageKVWorkerMetadata | None:
        """A report of these holds to the scheduler's half; None of none."""
        ranks = frozenset((self._place.rank,))
        return SageKVWorkerMetadata({hold: ranks for hold in released}) if released else None
