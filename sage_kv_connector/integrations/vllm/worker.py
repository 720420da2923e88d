# SPDX-License-Identifier: Apache-2.0
"""The worker's half: carries the scheduler's orders to the transport and brings back what ended.

vLLM's thread only enqueues here. Completions come on the control thread into
``Completions``, from which each step takes them. In a step without a forward pass
(everything waits for transfers) the step waits some milliseconds for the next
completion instead of spinning.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import Any

import msgspec
import numpy as np

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.bootstrap_room import metadata_transfer
from sage_kv_connector.contract.cache_view import KVCacheView
from sage_kv_connector.contract.node import node_id
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.engine.control.reachability import enabled_backends
from sage_kv_connector.engine.conversion.wire_plan import TokenRange
from sage_kv_connector.engine.core import EngineCore
from sage_kv_connector.engine.pages.source import NULL_PAGE, PagedSource, index_runs, window_segments
from sage_kv_connector.engine.session.messages import PageRuns
from sage_kv_connector.engine.transfer.consumer import Subscription, Wanted
from sage_kv_connector.engine.transfer.part_fetch import PagesWanted
from sage_kv_connector.integrations.common.audit import TransferAudit
from sage_kv_connector.integrations.common.gathered import GatheredOutcomes
from sage_kv_connector.integrations.common.outcome_text import outcome_text
from sage_kv_connector.integrations.common.prefill_ranks import DecodeRank, ReadPeer
from sage_kv_connector.integrations.vllm.accelerator import device_of, open_device, wait_for_compute
from sage_kv_connector.integrations.vllm.amx import request_amx_tiles
from sage_kv_connector.integrations.vllm.completions import Completions, StepResults
from sage_kv_connector.integrations.vllm.first_token import FirstTokenOffers
from sage_kv_connector.integrations.vllm.kv_caches import cache_schema, cache_view
from sage_kv_connector.integrations.vllm.metadata import (
    Finished,
    Load,
    Progress,
    SageKVConnectorMetadata,
    SageKVHandshakeMetadata,
)
from sage_kv_connector.integrations.vllm.prefill_directory import PrefillDirectory
from sage_kv_connector.integrations.vllm.remote_prefill import RemotePrefill

logger = logging.getLogger(__name__)

#: A step without a forward pass waits this long for a completion; new requests wait no longer for it.
#: Shorter waits cost the copy its core: between steps vLLM's worker polls its queue without sleeping.
IDLE_STEP_WAIT_S = 0.005
#: vLLM's block 0 stands for "no memory"; there is memory, but never anybody's KV.
VLLM_NULL_BLOCK = 0


def _tensors(cache: Any) -> list[Any]:
    """The tensors of one layer."""
    return list(cache) if isinstance(cache, tuple | list) else [cache]


class _OnOffer:
    """A prefill of this worker: its source and, per layer name, where it stands in the source."""

    def __init__(self, request_id: str, source: PagedSource) -> None:
        self.request_id = request_id
        self.source = source
        self.finished = False
        self.pages_after: tuple[int, ...] = ()


class WorkerSide:
    """Lives in each worker process; methods are called on vLLM's thread unless they say otherwise."""

    def __init__(
        self, vllm_config: Any, kv_cache_config: Any, config: KVTransportConfig, engine_id: str
    ) -> None:
        from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank

        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._config = config
        self._tp_rank = int(get_tensor_model_parallel_rank())
        self._tp_size = int(vllm_config.parallel_config.tensor_parallel_size)
        self._stage = int(get_pp_group().rank_in_group)
        self._rank = self._stage * self._tp_size + self._tp_rank
        self._engine_id = engine_id
        request_amx_tiles()
        self._core: EngineCore | None = None
        self._device: Any = None
        self._view: KVCacheView | None = None
        self._schema: KVCacheSchema | None = None
        self._schema_digest = ""
        self._layer_place: dict[str, tuple[int, int]] = {}
        self._results = Completions()
        self._directory: PrefillDirectory | None = None
        self._first_tokens: FirstTokenOffers | None = None
        self._audit = TransferAudit(config.audit_file, self._rank)
        self._on_offer: dict[str, _OnOffer] = {}
        self._in_step: list[Progress] = []
        self._loads: dict[str, Load] = {}
        self._handles: dict[str, list[Subscription]] = {}
        self._cancelled: set[str] = set()
        self._expected: dict[str, RemotePrefill] = {}
        self._renewed_at = 0.0
        self._failed_loads = 0
        self._last_counters: dict[str, int] = {}

    # -- start and end

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self._device = device_of([t for cache in kv_caches.values() for t in _tensors(cache)])
        self._view = cache_view(kv_caches, self._vllm_config, self._kv_cache_config)
        schema = cache_schema(
            self._view, self._vllm_config, self._kv_cache_config, self._tp_rank, self._stage
        )
        self._directory = PrefillDirectory(
            DecodeRank(self._tp_rank, self._tp_size, schema.total_kv_heads),
            int(self._vllm_config.parallel_config.pipeline_parallel_size),
            enabled_backends(self._config, on_device=self._device is not None),
            self._config.connect_timeout_s,
        )
        self._audit.describe(self._view, schema)
        self._schema = schema
        self._schema_digest = schema.digest()
        for group_index, group in enumerate(self._view.groups):
            for layer_index, layer in enumerate(group.layers):
                self._layer_place[layer.name] = (group_index, layer_index)
        memory = None
        if self._device is not None:
            if self._config.audit_file is not None:
                raise ValueError(
                    f"audit_file is {str(self._config.audit_file)!r}, but KV lies on {self._device}: "
                    "only host memory can be audited"
                )
            schema = msgspec.structs.replace(schema, memory="device")
            memory = open_device(self._device)
        self._core = EngineCore(
            self._config, engine_id=self._engine_id, rank=self._rank, schema=schema, device=memory
        )
        self._core.register_memory(self._view.extents())
        self._first_tokens = FirstTokenOffers(self._core)
        self._core.start()
        logger.info(
            "sage_kvt rank %d listens on %s; %.0f bytes of KV a token, schema %s",
            self._rank,
            ", ".join(self._core.addresses),
            schema.bytes_per_token(),
            self._schema_digest,
        )

    def handshake_metadata(self) -> SageKVHandshakeMetadata | None:
        if self._core is None:
            return None
        return SageKVHandshakeMetadata(self._core.addresses, node_id(), self._schema_digest)

    def registered(self) -> tuple[str, int, KVCacheSchema, tuple[str, ...], str]:
        """Engine id, rank, schema, addresses and node. Raises RuntimeError before vLLM registered its caches."""
        if self._core is None or self._schema is None:
            raise RuntimeError("vLLM has not registered its KV caches yet")
        return self._engine_id, self._rank, self._schema, self._core.addresses, node_id()

    def counters(self) -> dict[str, int]:
        counters = self._core.counters() if self._core is not None else {}
        return counters | {
            "loads": len(self._loads),
            "on_offer": len(self._on_offer),
            "failed_loads": self._failed_loads,
        }

    def changed_counters(self) -> dict[str, dict[str, int]]:
        """Rank (text) → counters, or nothing if they are what they were at the last call."""
        counters = self.counters()
        if counters == self._last_counters:
            return {}
        self._last_counters = counters
        return {str(self._rank): counters}

    def shutdown(self) -> None:
        if self._directory is not None:
            self._directory.close()
        if self._core is not None:
            self._core.close()

    # -- a step

    def begin_step(self, meta: SageKVConnectorMetadata) -> None:
        """Before the forward pass, and before pages that were given up are written again."""
        core, directory = self._core, self._directory
        if core is None or directory is None:
            return
        if meta.withdrawn:
            for transfer_id in meta.withdrawn:
                self._on_offer.pop(transfer_id, None)
            core.withdraw(meta.withdrawn, "aborted", "prefill was aborted or preempted")
        self._in_step = meta.progress
        for progress in meta.progress:
            self._advance_before(core, progress)
        for finished in meta.finished:
            self._finish(core, finished)
        for load in meta.loads:
            self._loads[load.request_id] = load
            directory.resolve(load.remote, partial(self._subscribe, load))
        for request_id in meta.cancelled_loads:
            self._cancel(core, request_id)
        for remote in meta.releases:
            directory.resolve(remote, partial(self._release, remote))
        self._renew(core, directory, meta)

    def layer_saved(self, layer_name: str) -> None:
        """A layer's KV of this step is written: stream it to whoever subscribed already."""
        place = self._layer_place.get(layer_name)
        core = self._core
        if place is None or core is None or self._device is not None:
            return  # on a device the layer is only launched yet
        group, layer = place
        for progress in self._in_step:
            if core.is_streaming(progress.transfer_id):
                offer = self._on_offer.get(progress.transfer_id)
                if offer is not None:
                    pages = offer.pages_after[group]
                    change = partial(offer.source.advance, group, slice(layer, layer + 1), pages)
                    core.update(progress.transfer_id, change)

    def end_forward(self) -> None:
        """After the forward pass every layer of the step is written."""
        if self._device is not None and self._in_step:
            wait_for_compute(self._device)
        for progress in self._in_step:
            offer = self._on_offer.get(progress.transfer_id)
            if offer is not None and self._core is not None:
                change = partial(_advance_all, offer.source, offer.pages_after)
                self._core.update(progress.transfer_id, change)
        self._in_step = []

    def take_results(self, *, has_forward: bool) -> StepResults:
        if not has_forward and (self._loads or any(o.finished for o in self._on_offer.values())):
            self._results.wait(IDLE_STEP_WAIT_S)
        sent, received = self._results.take()
        failed: set[str] = set()
        invalid: set[int] = set()
        for request_id, error in received.items():
            load = self._loads.pop(request_id, None)
            self._handles.pop(request_id, None)
            self._cancelled.discard(request_id)
            if error and load is not None:
                self._failed_loads += 1
                failed.add(request_id)
                invalid.update(page for pages in load.page_ids for page in pages)
        return StepResults(sent, set(received), failed, invalid)

    # -- prefill

    def _advance_before(self, core: EngineCore, progress: Progress) -> None:
        assert self._view is not None
        offer = self._on_offer.get(progress.transfer_id)
        if offer is None:
            offer = _OnOffer(progress.request_id, PagedSource(self._view, VLLM_NULL_BLOCK))
            self._on_offer[progress.transfer_id] = offer
            core.offer(progress.transfer_id, offer.source, partial(self._released, progress.transfer_id))
        sizes = [group.page_size for group in self._view.groups]
        before = tuple(progress.tokens_before // size for size in sizes)
        offer.pages_after = tuple(
            -(-progress.tokens_after // size) if progress.complete else progress.tokens_after // size
            for size in sizes
        )
        tables = _tables(progress.page_ids)

        def change(source: PagedSource = offer.source) -> None:
            for group, table in enumerate(tables):
                source.set_pages(group, table)
            if progress.complete:
                source.end(offer.pages_after)
            _advance_all(source, before)

        core.update(progress.transfer_id, change)

    def _finish(self, core: EngineCore, finished: Finished) -> None:
        offer = self._on_offer.get(finished.transfer_id)
        if offer is None:  # released or withdrawn before: nothing holds the pages
            self._results.add_sent(finished.request_id)
            return
        offer.finished = True
        assert self._view is not None
        pages = tuple(-(-finished.tokens // group.page_size) for group in self._view.groups)
        tables = _tables(finished.page_ids)

        def change(source: PagedSource = offer.source) -> None:
            for group, table in enumerate(tables):
                source.set_pages(group, table)
            source.end(pages)
            _advance_all(source, pages)

        core.update(finished.transfer_id, change)
        core.finish(finished.transfer_id)
        if finished.first_token is not None and self._first_tokens is not None:
            self._first_tokens.offer(finished.transfer_id, finished.first_token)

    def _released(self, transfer_id: str, outcome: Outcome) -> None:
        """Control thread: the pages of an offer are free."""
        offer = self._on_offer.get(transfer_id)
        if offer is None:
            return
        if outcome.stats is not None:
            self._audit.sent(offer.source, outcome)
            logger.info("sent %s: %s", transfer_id, outcome_text(outcome))
        if offer.finished:
            del self._on_offer[transfer_id]
            self._results.add_sent(offer.request_id)

    # -- decode

    def _subscribe(self, load: Load, peers: list[ReadPeer], why: str, *, again: bool = False) -> None:
        core, view = self._core, self._view
        if not peers or core is None or view is None:
            self._received(load, Outcome(load.remote.transfer_id, None, why))
            return
        for peer, readers in peers:
            if not readers:
                core.release(peer, load.remote.transfer_id)
            if load.remote.in_room:
                core.release(peer, metadata_transfer(load.remote.transfer_id), max(1, readers))
        reading = [read for read in peers if read.readers]
        gathered = GatheredOutcomes(len(reading), partial(self._landed, load, again), core.cancel)

        def started(handle: Subscription) -> None:
            self._handles.setdefault(load.request_id, []).append(handle)
            gathered.started(handle)
            if load.request_id in self._cancelled:
                core.cancel(handle)

        for peer, readers in reading:
            core.subscribe(peer, self._wanted(load, view, readers), gathered.add, started)

    def _wanted(self, load: Load, view: KVCacheView, readers: int) -> Wanted:
        arrays = [np.asarray(indices, dtype=np.int64) for indices in load.page_indices]
        ids = {group: np.asarray(pages, dtype=np.int64) for group, pages in enumerate(load.page_ids)}
        tokens = {}
        whole = all(len(indices) == indices[-1] - indices[0] + 1 for indices in arrays if len(indices))
        for group, indices in enumerate(arrays):
            if len(indices):
                first = int(indices[0]) * view.groups[group].page_size
                tokens[group] = TokenRange(first, load.tokens - first)
        return Wanted(
            transfer_id=load.remote.transfer_id,
            selection=tuple(
                PageRuns(group, index_runs(indices)) for group, indices in enumerate(arrays) if len(indices)
            ),
            segments=window_segments(view, ids),
            finished=load.remote.finished,
            deadline_s=self._config.deadline_s,
            paged=PagesWanted(view, tokens, {g: load.page_ids[g] for g in tokens}, readers)
            if whole
            else None,
            readers=readers,
        )

    def _landed(self, load: Load, again: bool, gathered: GatheredOutcomes) -> None:
        """Control thread: every peer's transfer ended."""
        outcome = gathered.outcome()
        directory = self._directory
        if directory is not None and not (outcome.reached or again) and directory.forget(load.remote):
            self._handles.pop(load.request_id, None)
            directory.resolve(load.remote, partial(self._subscribe, load, again=True))
            return
        if outcome.ok:
            for handle in gathered.handles:
                self._audit.received(handle, outcome)
        self._received(load, outcome)

    def _received(self, load: Load, outcome: Outcome) -> None:
        if outcome.ok:
            logger.info("received %s: %s", outcome.transfer_id, outcome_text(outcome))
        else:
            logger.warning("KV of %s did not arrive: %s", load.request_id, outcome.error)
        self._results.add_received(load.request_id, outcome.error)

    def _cancel(self, core: EngineCore, request_id: str) -> None:
        if request_id not in self._loads:
            return
        self._cancelled.add(request_id)
        for handle in self._handles.get(request_id, ()):
            core.cancel(handle)

    def _release(self, remote: RemotePrefill, peers: list[ReadPeer], why: str) -> None:
        if not peers or self._core is None:
            logger.warning("transfer %s can't be released: %s", remote.transfer_id, why)
            return
        for peer, readers in peers:
            self._core.release(peer, remote.transfer_id, max(1, readers))
            if remote.in_room:
                self._core.release(peer, metadata_transfer(remote.transfer_id), max(1, readers))

    def _renew(self, core: EngineCore, directory: PrefillDirectory, meta: SageKVConnectorMetadata) -> None:
        """Requests that queue here keep their pages there; a third of the lease leaves room for two misses."""
        for remote in meta.expected:
            self._expected[remote.transfer_id] = remote
        for transfer_id in meta.no_longer_expected:
            self._expected.pop(transfer_id, None)
        now = time.monotonic()
        if not self._expected or now - self._renewed_at < self._config.lease_s / 3:
            return
        self._renewed_at = now
        by_peer: dict[PeerAddress, list[str]] = {}
        for remote in self._expected.values():
            if remote.prefill is None:
                continue
            ids = [remote.transfer_id]
            if remote.in_room:
                ids.append(metadata_transfer(remote.transfer_id))
            for peer, _ in directory.peers(remote.prefill)[0]:
                by_peer.setdefault(peer, []).extend(ids)
        for peer, transfer_ids in by_peer.items():
            core.renew(peer, tuple(transfer_ids))


def _tables(page_ids: tuple[tuple[int, ...], ...]) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """vLLM's block ids as page ids; its null block has no memory of its own."""
    tables = []
    for ids in page_ids:
        table = np.asarray(ids, dtype=np.int64)
        tables.append(np.where(table == VLLM_NULL_BLOCK, NULL_PAGE, table))
    return tables


def _advance_all(source: PagedSource, pages: tuple[int, ...]) -> None:
    for group, count in enumerate(pages):
        source.advance(group, slice(None), count)
