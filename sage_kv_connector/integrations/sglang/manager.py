# SPDX-License-Identifier: Apache-2.0
"""What each scheduler rank of a prefill or decode server builds once: the engine and its rooms.

SGLang names a request by its bootstrap room (``prefill.py``). Its scheduler thread only enqueues;
what ended comes on the engine's control thread and becomes a status.
"""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from sglang.srt.disaggregation.common.conn import CommonKVManager
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.runtime_context import get_device, get_disagg, get_parallel

from sage_kv_connector.contract.bootstrap_room import RoomUses
from sage_kv_connector.contract.node import node_id
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.engine import EngineCore, TransferAudit
from sage_kv_connector.integrations.common.accelerator import (
    check_options,
    compute_events,
    device_named,
    open_device,
)
from sage_kv_connector.integrations.common.bootstrap_answers import FIELD
from sage_kv_connector.integrations.common.outcome_log import OutcomeLog, Side
from sage_kv_connector.integrations.common.prefill_ranks import PrefillRank
from sage_kv_connector.integrations.sglang.first_token import FirstTokenSlots
from sage_kv_connector.integrations.sglang.kv_pool import (
    PoolShape,
    cache_dtype,
    cache_schema,
    cache_view,
)
from sage_kv_connector.integrations.sglang.metadata_rows import MetadataRows, on_device
from sage_kv_connector.integrations.sglang.metrics import scheduler_metrics
from sage_kv_connector.integrations.sglang.options import options_from_environment
from sage_kv_connector.integrations.sglang.prefill import PrefillRooms
from sage_kv_connector.integrations.sglang.prefill_servers import PrefillServers
from sage_kv_connector.integrations.sglang.registered import write_rank
from sage_kv_connector.integrations.sglang.sliding_windows import follow_windows, window_layers
from sage_kv_connector.integrations.sglang.weights import follow_weights, own_version, own_weights, weights_of

logger = logging.getLogger(__name__)


class SageKVManager(CommonKVManager):  # type: ignore[misc]
    """Methods are called on SGLang's scheduler thread unless they say otherwise."""

    def __init__(
        self, args: Any, disaggregation_mode: Any, server_args: Any, is_mla_backend: bool | None = False
    ) -> None:
        _refuse_topology()
        self.config = options_from_environment()
        self.device = device_named(str(get_device().device), int(getattr(args, "gpu_id", 0) or 0))
        check_options(self.device, self.config)
        self.shape = _pool_shape(args, server_args, bool(is_mla_backend))
        if self.config.same_weights:
            self.shape = self.shape._replace(weights=weights_of(server_args, own_version()))
        self.view = cache_view(args, self.shape)
        self._schema = cache_schema(self.view, self.shape)
        rank = self.shape.pp_rank * self.shape.tp_size + self.shape.tp_rank
        self.audit = TransferAudit(self.config.audit_file, rank)
        self.audit.describe(self.view, self._schema)
        memory = None if self.device is None else open_device(self.device)
        #: What SGLang launched on the device; None for host memory.
        self.computed = None if self.device is None else compute_events(self.device)
        self.core = EngineCore(self.config, rank=rank, schema=self._described(), device=memory)
        self.core.register_memory(self.view.extents())
        staged = self.device is not None and on_device(args, self.device)
        self.metadata = MetadataRows(args, memory if staged else None, self.computed)
        # The rooms' buffer is the last one, or the one before the checksums'.
        checksums = bool(getattr(get_disagg(), "disaggregation_enable_kv_checksum", False))
        self.first_tokens = FirstTokenSlots(self.metadata, -2 if checksums else -1)
        for address, length in (*self.metadata.extents(), self.first_tokens.extent()):
            self.core.register_host_memory(address, length)
        self.core.start()
        self.metrics = scheduler_metrics(
            self.core,
            server_args,
            {
                "engine_type": disaggregation_mode.value,
                "tp_rank": self.shape.tp_rank,
                "pp_rank": self.shape.pp_rank,
            },
        )
        write_rank(self.core, self._schema)
        if self.config.same_weights:
            follow_weights(self._weights_replaced)
        self.rooms = PrefillRooms(self)
        self.outcome_log = OutcomeLog(logger, Side.DECODE)
        self.room_uses = RoomUses()
        self.servers = PrefillServers(super().try_ensure_parallel_info, self.config.connect_timeout_s)
        logger.info(
            "sage_kvt rank %d listens on %s; %.0f bytes of KV a token, schema %s",
            rank,
            ", ".join(self.core.addresses),
            self._schema.bytes_per_token(),
            self._schema.digest(),
        )
        super().__init__(args, disaggregation_mode, server_args, is_mla_backend)
        if self.defer_decode_allocation:
            raise ValueError(
                "disaggregation_decode_allocation_policy 'prefill_complete' does not work with sage_kvt; "
                "allowed: early"
            )
        if disaggregation_mode == DisaggregationMode.DECODE:
            follow_windows()
            _warn_of_scattered_samples()
            self._start_heartbeat_checker_thread()

    def _register_topology_row(self, url: str, payload: dict[str, Any]) -> None:
        """Registration with the bootstrap server carries where this rank's transport listens."""
        ours = PrefillRank(self.core.engine_id, self.core.rank, self.core.addresses, node_id())
        super()._register_topology_row(url, payload | {FIELD: msgspec.to_builtins(ours)})

    def try_ensure_parallel_info(self, bootstrap_addr: str) -> bool:
        """Whether SGLang may make receivers of this prefill server; it asks again a second later."""
        if bootstrap_addr not in self.prefill_info_table:
            self.servers.ask(bootstrap_addr)
        return bootstrap_addr in self.prefill_info_table

    def forget_prefill(self, bootstrap_addr: str) -> None:
        """The next request for it waits until it has answered."""
        self.servers.forget(bootstrap_addr)
        with self.connection_lock:
            self.prefill_info_table.pop(bootstrap_addr, None)

    def _weights_replaced(self, version: str) -> None:
        """What waits to be fetched is KV of the weights before. Sessions agreed on these end, with what they carry."""
        self.rooms.void(f"the weights were replaced (version {version})")
        self._schema = msgspec.structs.replace(self._schema, weights=own_weights())
        self.core.describe(self._described())
        write_rank(self.core, self._schema)
        logger.info("sage_kvt: the weights were replaced (version %s)", version)

    def _described(self) -> KVCacheSchema:
        """What peers hear."""
        if self.device is None:
            return self._schema
        return msgspec.structs.replace(self._schema, memory="device")

    # -- SGLang's senders

    def add_transfer_request(
        self,
        bootstrap_room: int,
        kv_indices: Any,
        index_slice: slice,
        is_last_chunk: bool,
        aux_index: int | None = None,
        state_indices: list[Any] | None = None,
        wait_event: Any = None,
        indices_event: Any = None,
        **_: Any,
    ) -> None:
        """A chunk's pages are computed, or launched; with the last one the metadata row is too, and the windows' pages.

        ``wait_event``, ``indices_event``: recorded by SGLang where an earlier step may still write the pages, and
        where the device still copies ``kv_indices``.
        """
        recorded = tuple(event for event in (wait_event, indices_event) if event is not None)
        self.rooms.add_chunk(bootstrap_room, kv_indices, is_last_chunk, aux_index, state_indices, recorded)


def _refuse_topology() -> None:
    """Raises ValueError for what the engine's ranks can't be yet."""
    parallel = get_parallel()
    for name in ("attn_cp_size", "attn_dcp_size"):
        if (size := int(getattr(parallel, name, 1))) != 1:
            raise ValueError(f"{name} is {size}; sage_kvt allows 1")


def _warn_of_scattered_samples() -> None:
    """Each rank counts the uses of a room by itself (``RoomUses``)."""
    parallel = get_parallel()
    if parallel.num_dp_ranks > 1 and parallel.load_balance_method != "follow_bootstrap_room":
        logger.warning(
            "sage_kvt: load_balance_method is %s on a data parallel decode: requests with n > 1 will fail; "
            "follow_bootstrap_room serves them",
            parallel.load_balance_method,
        )


def _pool_shape(kv_args: Any, server_args: Any, latent: bool) -> PoolShape:
    from sglang.srt.configs.model_config import ModelConfig

    parallel = get_parallel()
    model = ModelConfig.from_server_args(server_args)
    size = int(parallel.attn_tp_size)
    total = 1 if latent else int(model.get_total_num_kv_heads())
    return PoolShape(
        model=str(server_args.model_path),
        dtype=cache_dtype(str(kv_args.kv_cache_dtype_str), str(model.dtype)),
        total_layers=int(model.num_hidden_layers),
        total_heads=total,
        heads=max(1, total // size),
        latent=latent,
        tp_rank=int(parallel.attn_tp_rank),
        tp_size=size,
        pp_rank=int(kv_args.pp_rank),
        pp_size=int(parallel.pp_size),
        windows=window_layers(kv_args, model, size, int(parallel.pp_size)),
    )
