# SPDX-License-Identifier: Apache-2.0
"""Requests on prefill: rooms with their two transfers, and SGLang's sender of each.

A room has two transfers: its KV pages, and once they are complete the row of metadata buffers with the
first token.

``KVPoll`` of a sender: Bootstrapping → WaitingForInput at once, since pages are offered and prefill need not
wait for decode → Transferring from the first chunk → Success when pages and metadata were fetched,
or Failed: aborted, given up by decode, or not fetched within the lease.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import CommonKVSender
from sglang.srt.runtime_context import get_parallel

from sage_kv_connector.contract.bootstrap_room import metadata_transfer, pages_transfer
from sage_kv_connector.contract.failure import Code, Failure, Reason
from sage_kv_connector.contract.failure_kinds import FAILURE_KINDS
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.engine import MemorySource, OfferTerms, PagedSource
from sage_kv_connector.integrations.common.compute_events import ComputeEvents, RecordedEvent
from sage_kv_connector.integrations.common.outcome_log import OutcomeLog, Side
from sage_kv_connector.integrations.sglang.metadata_rows import MetadataRows
from sage_kv_connector.integrations.sglang.sliding_windows import WINDOW_GROUP, window_table

logger = logging.getLogger(__name__)

#: SGLang keeps page 0 for padding: its memory is there, its content is nobody's.
PADDING_PAGE = 0


class _Room:
    """A request on prefill. ``lock`` is what becomes final, against the room's end."""

    def __init__(self, number: int, source: PagedSource) -> None:
        self.number = number
        self.source = source
        self.lock = threading.RLock()
        self.closed = False
        self.copying = 0  # its metadata row, on the way from a device
        self.settled = 0  # of its two transfers: delivered, or not needed
        self.nbytes = 0
        self.transfer_s: float | None = None
        self.void = ""  # why its KV is of no use to anybody
        self.telling = (
            threading.Lock()
        )  # taken for good by who tells of the first failure of its two transfers


class Delivered(NamedTuple):
    """What a room's transfers moved so far; ``transfer_s`` once the KV is delivered."""

    nbytes: int
    transfer_s: float | None


class PrefillRooms:
    """All requests of a prefill rank; ``manager`` has the engine and takes the statuses.

    Methods are called on SGLang's scheduler thread unless they say otherwise.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._core = manager.core
        self._metadata: MetadataRows = manager.metadata
        self._computed: ComputeEvents | None = manager.computed
        self._has_windows = len(manager.view.groups) > WINDOW_GROUP
        self._log = OutcomeLog(logger, Side.PREFILL)
        self._rooms: dict[int, _Room] = {}

    def open(self, room: int) -> None:
        """Offer a request's pages before there are any: decode may subscribe as early as it likes."""
        opened = self._rooms[room] = _Room(room, PagedSource(self._manager.view, PADDING_PAGE))
        self._core.offer(pages_transfer(room), opened.source, partial(self._released, opened, True))

    def add_chunk(
        self,
        number: int,
        kv_indices: Any,
        is_last: bool,
        aux_index: int | None,
        state_indices: Sequence[Any] | None,
        recorded: Sequence[RecordedEvent],
    ) -> None:
        """A chunk's pages are final once ``recorded`` is over, or without it what was launched so far.

        With the last chunk the metadata row is final too, once all is that was launched so far.
        ``kv_indices``: an array, or a pinned tensor that is read only then. ``state_indices``: of a hybrid pool, the
        pages of the request's windows, with the last chunk.
        """
        room = self._rooms.get(number)
        if room is None:
            return
        self._manager.update_status(number, KVPoll.Transferring)
        assert aux_index is not None or not is_last
        final = partial(self._final, room, kv_indices, aux_index if is_last else None, state_indices)
        if self._computed is not None:
            failed = partial(self._device_failed, room)
            if recorded and is_last:  # these don't cover the metadata row
                self._computed.behind(lambda: None, failed, recorded)
                recorded = ()
            self._computed.behind(final, failed, recorded or None)
            return
        for event in recorded:
            event.synchronize()
        final()

    def _final(
        self, room: _Room, kv_indices: Any, aux_index: int | None, state_indices: Sequence[Any] | None
    ) -> None:
        """SGLang's thread, or on a device the one that waited for it."""
        transfer = pages_transfer(room.number)
        pages = np.array(kv_indices, dtype=np.int64)
        windows = None
        if aux_index is not None and self._has_windows:
            try:
                windows = window_table(state_indices, room.source.tables.length(0) + len(pages))
            except ValueError as error:
                self._lost(room, f"prefill's sliding windows: {error}")
                return
        with room.lock:
            if room.closed or room.void:
                return
            if len(pages):
                self._core.update(transfer, room.source.append, 0, pages)
            if aux_index is None:
                return
            if windows is not None:
                self._core.update(transfer, room.source.append, WINDOW_GROUP, windows)
            self._core.update(transfer, room.source.end_here)
            self._core.finish(transfer)
            room.copying = self._metadata.fetch(aux_index, partial(self._row_is_here, room, aux_index))

    def _row_is_here(self, room: _Room, aux_index: int, error: str) -> None:
        """Any thread: the metadata row can be offered."""
        if error:
            self._device_failed(room, error)
            return
        with room.lock:
            if room.closed or room.void:
                return
            self._core.offer(
                metadata_transfer(pages_transfer(room.number)),
                MemorySource(self._metadata.segments(aux_index)),
                partial(self._released, room, False),
                OfferTerms(finished=True),
            )

    def _device_failed(self, room: _Room, error: str) -> None:
        self._lost(room, f"prefill's device failed: {error}")

    def _lost(self, room: _Room, why: str) -> None:
        """Any thread but the control thread: what this room's KV was to be is lost."""
        with room.lock:
            if room.closed or room.void:
                return
            room.void = why
        failure = Failure(Code.WITHDRAWN, FAILURE_KINDS[Code.WITHDRAWN].stage, room.void)
        self._tell(room, Outcome(pages_transfer(room.number), None, failure))
        self._fail(room)

    def close(self, room: int, why: str) -> Delivered:
        """Forget a request; returns when nothing of its memory is read any more."""
        known = self._rooms.pop(room, None)
        if known is None:
            return Delivered(0, None)
        with known.lock:
            known.closed = True
        self._metadata.cancel(known.copying)
        if known.settled < 2:
            self._give_up(known, why=known.void or why)  # SGLang clears what failed
        return Delivered(known.nbytes, known.transfer_s)

    def void(self, why: str) -> None:
        """Every room that was not fetched yet fails; returns when nothing of their memory is read any more."""
        failed = []
        for room in self._rooms.values():
            with room.lock:
                if room.settled < 2:
                    room.void = why
                    failed.append(room)
        self._fail(*failed)

    def _fail(self, *rooms: _Room) -> None:
        for room in rooms:
            self._manager.record_failure(room.number, room.void)
            self._manager.update_status(room.number, KVPoll.Failed)
        self._give_up(*rooms, why=rooms[0].void if rooms else "")

    def _give_up(self, *rooms: _Room, why: str) -> None:
        pages = [pages_transfer(room.number) for room in rooms]
        self._core.give_up((*pages, *map(metadata_transfer, pages)), Reason(Code.WITHDRAWN, why))

    def delivered(self, room: int) -> Delivered:
        known = self._rooms.get(room)
        return Delivered(0, None) if known is None else Delivered(known.nbytes, known.transfer_s)

    def _released(self, room: _Room, is_kv: bool, outcome: Outcome) -> None:
        """Control thread: one of a room's transfers ended."""
        number = room.number
        known = self._rooms.get(number) is room
        if is_kv or (known and outcome.failure is not None):
            self._tell(room, outcome)
        if not known:
            return
        if outcome.error:
            self._manager.record_failure(number, f"{outcome.transfer_id}: {outcome.error}")
            self._manager.update_status(number, KVPoll.Failed)
            return
        room.settled += 1
        if outcome.stats is not None:
            room.nbytes += outcome.stats.nbytes
            if is_kv:
                room.transfer_s = outcome.stats.transfer_s
                self._manager.audit.sent(room.source, outcome)
        if room.settled == 2:
            self._manager.update_status(number, KVPoll.Success)

    def _tell(self, room: _Room, outcome: Outcome) -> None:
        """Any thread, to the log and the counters: a room fails once."""
        if outcome.failure is not None:
            if not room.telling.acquire(blocking=False):
                return
            if not outcome.aborted:
                self._core.recorder.add("failed_offers_total", (str(outcome.failure.code),))
        self._log.write(f"room {room.number}", outcome)


def _rank_of_room(manager: Any, room: int) -> bool:
    """Whether a data parallel prefill sent this room to the rank where decode looks for it.

    SGLang 0.5.23 asks so itself, but of the attention's rank, which is 0 in all without ``--enable-dp-attention``.
    """
    if get_parallel().load_balance_method != "follow_bootstrap_room" or manager.system_dp_size == 1:
        return False
    return bool(room % manager.system_dp_size == manager.system_dp_rank)


class SageKVSender(CommonKVSender):  # type: ignore[misc]
    """Methods are called on SGLang's scheduler thread."""

    #: Pages may come as pinned tensors that a CUDA event stands before: only where there are such events.
    supports_host_tensor_indices = False

    def __init__(
        self,
        mgr: Any,
        bootstrap_addr: str,
        bootstrap_room: int,
        req_has_disagg_prefill_dp_rank: bool = False,
        **more: Any,
    ) -> None:
        self.supports_host_tensor_indices = mgr.device is not None and mgr.device.type == "cuda"
        room = mgr.room_uses.next(bootstrap_room)
        rank_is_known = req_has_disagg_prefill_dp_rank or _rank_of_room(mgr, room)
        super().__init__(mgr, bootstrap_addr, room, rank_is_known, **more)
        if mgr.request_status.get(room) == KVPoll.Bootstrapping:
            mgr.rooms.open(room)
            mgr.update_status(room, KVPoll.WaitingForInput)

    def poll(self) -> Any:
        self.kv_mgr.core.check_alive()
        return super().poll()

    def pop_decode_prefix_len(self) -> int:
        """Everything is offered; decode asks only for what its own cache lacks."""
        return 0

    def get_max_transfer_tokens(self) -> int | None:
        return None

    def get_transfer_metric(self) -> Any:
        moved = self.kv_mgr.rooms.delivered(self.bootstrap_room)
        self._transfer_metric.transfer_total_bytes = moved.nbytes
        self._transfer_metric.transfer_latency_s = moved.transfer_s
        return self._transfer_metric

    def abort(self) -> None:
        super().abort()
        self.kv_mgr.rooms.close(self.bootstrap_room, "prefill was aborted")

    def clear(self) -> None:
        self.kv_mgr.rooms.close(self.bootstrap_room, "prefill gave the request up")
        super().clear()
