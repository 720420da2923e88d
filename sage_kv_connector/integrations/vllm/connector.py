# SPDX-License-Identifier: Apache-2.0
"""The class vLLM builds once for its scheduler and once in each worker.

It absorbs what differs between vLLM's releases (docs/vllm-versions.md): renamed
hooks are answered under both names, and each half gets the same calls whichever
release makes them.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.integrations.vllm.draining import follow_draining
from sage_kv_connector.integrations.vllm.given_options import ORIGIN
from sage_kv_connector.integrations.vllm.logs import follow_vllm_logging
from sage_kv_connector.integrations.vllm.metadata import (
    SageKVConnectorMetadata,
    SageKVHandshakeMetadata,
    SageKVWorkerMetadata,
)
from sage_kv_connector.integrations.vllm.parallel import own_ports, refuse_context_parallel
from sage_kv_connector.integrations.vllm.required_layout import required_layout
from sage_kv_connector.integrations.vllm.scheduler import SchedulerSide
from sage_kv_connector.integrations.vllm.specs import transfer_groups
from sage_kv_connector.integrations.vllm.stats import HeldByRanks, SageKVPromMetrics, SageKVStats
from sage_kv_connector.integrations.vllm.weights import follow_weights
from sage_kv_connector.integrations.vllm.worker import WorkerSide


class _NoHMA:
    """Stands in for SupportsHMA in releases that have none."""


SupportsHMA: Any = getattr(base, "SupportsHMA", _NoHMA)
#: Since this class exists a step's results are one value, and whole requests can be reported as failed.
TransferResults: Any = getattr(base, "KVConnectorTransferResults", None)


def refuse_sleep_mode(vllm_config: Any, base: type) -> None:
    """Raises ValueError where sleep would discard the cache under transfers."""
    asked = bool(getattr(vllm_config.model_config, "enable_sleep_mode", False))
    if asked and not hasattr(base, "unregister_kv_caches"):
        raise ValueError(
            "enable_sleep_mode is True, and this vLLM does not tell its connectors before it discards the KV cache: "
            "with sage_kvt it must be False, or vLLM 0.33 or later"
        )


class SageKVConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """KV hand-over between vLLM servers through sage_kv_connector's transport engine.

    ``kv_connector_extra_config`` takes the fields of KVTransportConfig; a bad one
    fails the start with an error that names it.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        try:
            super().__init__(vllm_config, role, kv_cache_config)
        except TypeError:  # releases whose base took two arguments
            super().__init__(vllm_config, role)
        if kv_cache_config is None:
            raise ValueError(
                "sage_kvt needs kv_cache_config, which this vLLM does not pass to its connectors"
            )
        transfer = vllm_config.kv_transfer_config
        refuse_context_parallel(vllm_config.parallel_config)
        config = own_ports(
            KVTransportConfig.load(transfer.kv_connector_extra_config, ORIGIN), vllm_config.parallel_config
        )
        engine_id = str(transfer.engine_id)
        refuse_sleep_mode(vllm_config, KVConnectorBase_V1)
        self._single_group = len(transfer_groups(kv_cache_config)) == 1
        self._idle = False
        self._released: set[int] = set()
        self._held = HeldByRanks()
        self._invalid_blocks: set[int] = set()
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        follow_vllm_logging(config.log_format)
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(vllm_config, kv_cache_config, config, engine_id)
            follow_weights()
            follow_draining()
        else:
            self._worker = WorkerSide(vllm_config, kv_cache_config, config, engine_id)

    @property
    def scheduler_side(self) -> SchedulerSide:
        assert self._scheduler is not None, "a scheduler hook was called on a worker's connector"
        return self._scheduler

    @property
    def worker_side(self) -> WorkerSide:
        assert self._worker is not None, "a worker hook was called on the scheduler's connector"
        return self._worker

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        return required_layout(vllm_config)

    # -- worker hooks

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self.worker_side.register_kv_caches(kv_caches)

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        return True

    def unregister_kv_caches(self) -> None:
        self.worker_side.unregister_kv_caches()

    def restore_kv_caches(self) -> None:
        self.worker_side.restore_kv_caches()

    def get_handshake_metadata(self) -> SageKVHandshakeMetadata | None:
        return self.worker_side.handshake_metadata()

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """Comes before the step's blocks are zeroed or copied to, which binding its metadata may not.

        Releases before 0.19 pass ids of requests: there binding has to do.
        """
        if isinstance(kv_connector_metadata, SageKVConnectorMetadata):
            self.worker_side.withdraw(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, SageKVConnectorMetadata)
        self._idle = connector_metadata.idle
        self.worker_side.begin_step(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Loads were started when the step's metadata was bound."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Requests only run once all their pages landed."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        self.worker_side.layer_saved(layer_name)

    def wait_for_save(self) -> None:
        self.worker_side.end_forward()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        results = self._take_results()
        return results.sent or None, results.received or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        results = self._take_results()
        failed = set() if self._single_group else results.failed
        return TransferResults(
            finished_sending=results.sent, finished_recving=results.received, failed_recving=failed
        )

    def get_block_ids_with_load_errors(self) -> set[int]:
        invalid, self._invalid_blocks = self._invalid_blocks, set()
        return invalid

    def build_connector_worker_meta(self) -> SageKVWorkerMetadata | None:
        """Comes after the step's results were taken."""
        released, self._released = self._released, set()
        return self.worker_side.worker_meta(released)

    def get_kv_connector_stats(self) -> SageKVStats | None:
        """A worker's report; on the scheduler's side what all workers hold, since each tells of itself only."""
        return self._held.take() if self._worker is None else self._worker.report()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> SageKVStats:
        return SageKVStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> SageKVPromMetrics:
        return SageKVPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def _take_results(self) -> Any:
        results = self.worker_side.take_results(idle=self._idle)
        self._released |= results.released
        # Block ids are unique within one group only; with several the whole request is reported.
        if self._single_group or TransferResults is None:
            self._invalid_blocks |= results.invalid_blocks
        return results

    # -- scheduler hooks

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Since 0.30. Where it is not called vLLM keeps the blocks of finished prefills."""
        super().bind_kv_cache_manager(kv_cache_manager)
        self.scheduler_side.bind(kv_cache_manager)

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        return tuple(group_id for group_id, _ in transfer_groups(self._kv_cache_config))

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self.scheduler_side.num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self.scheduler_side.update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> SageKVConnectorMetadata:
        return self.scheduler_side.build_meta(scheduler_output)

    def on_new_request(self, request: Any) -> None:
        self.scheduler_side.on_new_request(request)

    def update_connector_output(self, connector_output: Any) -> None:
        self._held.hear(getattr(connector_output, "kv_connector_stats", None))
        self.scheduler_side.update_connector_output(connector_output)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.scheduler_side.request_finished(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.scheduler_side.request_finished(request, block_ids)

    def reset_cache(self) -> bool:
        self.scheduler_side.reset_cache()
        return True

    def weights_replaced(self, version: str) -> None:
        """No hook of vLLM's: ``weights.py`` calls it."""
        self.scheduler_side.weights_replaced(version)

    def drains(self, draining: bool) -> None:
        """No hook of vLLM's: ``draining.py`` calls it."""
        self.scheduler_side.drains(draining)

    def has_pending_push_work(self) -> bool:
        return self.scheduler_side.has_pending_push_work()

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        self.scheduler_side.set_ranks(metadata)

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        size = 1 + max(tp_rank for _, tp_rank in metadata)
        self.scheduler_side.set_ranks({stage * size + rank: meta for (stage, rank), meta in metadata.items()})

    # -- both

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.shutdown()
        if self._scheduler is not None:
            self._scheduler.shutdown()
