# SPDX-License-Identifier: Apache-2.0
"""One request on decode.

``KVPoll``: Bootstrapping → WaitingForInput when the prefill ranks are known → Transferring when
decode has pages and asked for their content → Success when pages and metadata landed and held, or
Failed: aborted, prefill gave it up or died, a checksum did not hold, or the time was over.
"""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import CommonKVReceiver

from sage_kv_connector.backends.base import Segments
from sage_kv_connector.contract.bootstrap_room import MetadataKind, metadata_transfer, pages_transfer
from sage_kv_connector.contract.failure import Code, Failure, Reason, Stage
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.contract.prompt import UNBOUND, PromptDigest
from sage_kv_connector.engine import GroupPages, MemoryTarget, PagesTarget, Target, Wanted
from sage_kv_connector.integrations.common.bootstrap_answers import FIELD
from sage_kv_connector.integrations.common.landing import Landing
from sage_kv_connector.integrations.common.prefill_ranks import (
    DecodeRank,
    PrefillEngine,
    ReadPeer,
    read_peers,
)
from sage_kv_connector.integrations.sglang.sliding_windows import WINDOW_GROUP, window_pages


class SageKVReceiver(CommonKVReceiver):  # type: ignore[misc]
    """Methods are called on SGLang's scheduler thread unless they say otherwise."""

    #: Of a hybrid pool: the first token in the request's window, if SGLang told it.
    window_begin: int | None = None

    def __init__(self, mgr: Any, bootstrap_addr: str, bootstrap_room: int | None = None) -> None:
        self._prefill: PrefillEngine | None = None
        self._peers: list[ReadPeer] = []
        self._landing: Landing | None = None
        self._ending = threading.Lock()  #: the metadata row's way to SGLang, against the request's end
        self._over = False
        self._storing = 0
        self._renewed_at = time.monotonic()
        #: As SGLang knows it; ``bootstrap_room`` is this use's own.
        self._named_room = bootstrap_room
        room = None if bootstrap_room is None else mgr.room_uses.next(bootstrap_room)
        super().__init__(mgr, bootstrap_addr, room)

    # -- where prefill is

    def _setup_bootstrap_infos(self) -> None:
        """Every rank of the prefill server, asked for once and kept until the server is lost."""
        self.bootstrap_infos = None
        prefill = self.kv_mgr.servers.find(self.bootstrap_addr, self.prefill_dp_rank)
        if isinstance(prefill, Reason):
            self.kv_mgr.forget_prefill(self.bootstrap_addr)
            self._refuse(prefill.code, prefill.detail)
            return
        shape = self.kv_mgr.shape
        decode = DecodeRank(shape.tp_rank, shape.tp_size, shape.total_heads)
        try:
            self._peers = read_peers(decode, prefill, tuple(self.kv_mgr.core.backends))
        except ValueError as error:
            self._refuse(Code.PARALLEL_SIZES, str(error))
            return
        self._prefill = prefill
        self.bootstrap_infos = [{FIELD: prefill}]  # SGLang looks for addresses of its own in it

    def invalidate_cached_bootstrap_infos(self) -> None:
        super().invalidate_cached_bootstrap_infos()
        self.kv_mgr.servers.forget(self.bootstrap_addr)

    # -- the transfer

    def send_metadata(
        self,
        kv_indices: npt.NDArray[np.int32],
        aux_index: int | None = None,
        state_indices: list[Any] | None = None,
        decode_prefix_len: int | None = None,
        **_: Any,
    ) -> None:
        """Decode has pages: ask for their content, and for the first token."""
        if self._prefill is None or not self._peers or aux_index is None:
            self._refuse(Code.BOOTSTRAP, "its ranks are not known")
            return
        reading = [read for read in self._peers if read.consumers]
        pages = np.array(kv_indices, dtype=np.int64)
        wanted: list[tuple[PeerAddress, Wanted]] = []
        if len(pages):
            try:
                target = self._pages_target(pages, decode_prefix_len or 0, state_indices)
            except ValueError as error:
                self._refuse(Code.BAD_SELECTION, str(error))
                return
            # SGLang tells no number of tokens: the last page holds at least one.
            size = self.kv_mgr.view.groups[0].page_size
            prompt = PromptDigest(target.groups[0].tokens.stop - size + 1)
            wanted += [(read.peer, self._wanted(self._pages, target, read, prompt)) for read in reading]
        # The last pipeline stage samples the first token.
        first_token = MemoryTarget(self._metadata_segments(aux_index))
        wanted.append(
            (reading[-1].peer, self._wanted(metadata_transfer(self._pages), first_token, reading[-1]))
        )
        for read in self._peers:
            if not read.consumers or not len(pages):
                self._release(read, self._pages)
            if read is not reading[-1]:
                self._release(read, metadata_transfer(self._pages))
        self.kv_mgr.metadata.expect()
        self._landing = Landing(self.kv_mgr.core, partial(self._landed, self.bootstrap_room, aux_index))
        self.kv_mgr.update_status(self.bootstrap_room, KVPoll.Transferring)
        self.init_time = time.time()
        self._landing.start(wanted)

    def _wanted(
        self, transfer_id: str, target: Target, read: ReadPeer, prompt: PromptDigest = UNBOUND
    ) -> Wanted:
        return Wanted(transfer_id, target, False, self._deadline_s(), read.consumers, prompt)

    def _pages_target(
        self, pages: npt.NDArray[np.int64], prefix: int, state_indices: list[Any] | None
    ) -> PagesTarget:
        """Raises ValueError for pages of windows that can't be this request's."""
        view = self.kv_mgr.view
        size = view.groups[0].page_size
        runs = ((prefix // size, len(pages)),)
        groups = [GroupPages(0, runs, pages, range(prefix, prefix + len(pages) * size))]
        if len(view.groups) > WINDOW_GROUP:
            if self._has_first_token:
                raise ValueError("a hybrid pool's sliding windows go between SGLang's servers only")
            begin = None if self.window_begin is None else max(prefix, self.window_begin)
            groups.append(window_pages(state_indices, runs[0][0] + len(pages), size, begin))
        return PagesTarget(view, tuple(groups))

    def _metadata_segments(self, aux_index: int) -> Segments:
        if self._has_first_token:
            slot: Segments = self.kv_mgr.first_tokens.segments(aux_index)
            return slot
        row: Segments = self.kv_mgr.metadata.segments(aux_index)
        return row

    @property
    def _has_first_token(self) -> bool:
        """Whether prefill is another engine, which sends the first token alone."""
        return self._prefill is not None and self._prefill.metadata is MetadataKind.FIRST_TOKEN

    def _deadline_s(self) -> float:
        """SGLang's own limit, which covers prefill's queue, unless one was chosen."""
        config = self.kv_mgr.config
        return float(
            config.deadline_s if "deadline_s" in config.model_fields_set else self.kv_mgr.waiting_timeout
        )

    def _landed(self, room: int, row: int, landing: Landing) -> None:
        """Control thread: nothing writes into the request's memory any more, but for its metadata ``row``."""
        outcome = landing.outcome()
        with self._ending:
            if self._over:
                return
            if outcome.ok and self._has_first_token:
                try:
                    self.kv_mgr.first_tokens.commit(row, self._named_room)
                except ValueError as wrong:
                    failure = Failure(Code.FIRST_TOKEN, Stage.MOVE, str(wrong))
                    outcome = Outcome(outcome.transfer_id, None, failure)
            if outcome.ok:
                self._storing = self.kv_mgr.metadata.store(row, partial(self._ended, room, landing, outcome))
                return
        self._ended(room, landing, outcome, "")

    def _ended(self, room: int, landing: Landing, outcome: Outcome, error: str) -> None:
        """Control thread, or a lane's: pages and row are there, or what went wrong."""
        if room not in self.kv_mgr.request_status:
            return  # cleared: a failure kept now would be the next request's of this room
        if error:
            failure = Failure(Code.LANDING, Stage.MOVE, f"metadata row: {error}")
            outcome = Outcome(outcome.transfer_id, None, failure)
        self._log(outcome)
        if not outcome.ok:
            self.kv_mgr.record_failure(room, outcome.error)
            self.invalidate_cached_bootstrap_infos()
            self.kv_mgr.update_status(room, KVPoll.Failed)
            return
        for one in landing.landed:
            if one.has_pages:
                self.kv_mgr.audit.received(one.subscription, one.outcome)
        self.kv_mgr.update_status(room, KVPoll.Success)

    def poll(self) -> Any:
        self.kv_mgr.core.check_alive()
        status = super().poll()
        if status == KVPoll.WaitingForInput and self._landing is None:
            self._renew()
        return status

    def _renew(self) -> None:
        """A request that waits here for pages keeps those on prefill; a third of the lease allows two misses."""
        now = time.monotonic()
        if now - self._renewed_at < self.kv_mgr.config.lease_s / 3:
            return
        self._renewed_at = now
        for read in self._peers:
            self.kv_mgr.core.renew(read.peer, (self._pages, metadata_transfer(self._pages)))

    # -- the end

    def _send_abort_notification(self, *, force_arm: bool = False) -> None:
        """Prefill learns it through the session: by the subscriptions' end, or by a release."""
        failure = Failure(Code.CANCELLED, Stage.WAIT, "the request was aborted", aborted=True)
        if self._landing is not None:
            if not self._landing.ended:
                self._log(Outcome(self._pages, None, failure))
            self._stop(self._landing)
            return
        self._log(Outcome(self._pages, None, failure))
        for read in self._peers:
            for transfer in (self._pages, metadata_transfer(self._pages)):
                self._release(read, transfer, "decode aborted the request")

    def _clear(self) -> None:
        """The pages are given to others after this."""
        if self._landing is not None:
            self._stop(self._landing)
        super()._clear()

    def _stop(self, landing: Landing) -> None:
        """When this returns nothing writes into the request's memory."""
        landing.stop()
        with self._ending:
            self._over = True
        self.kv_mgr.metadata.cancel(self._storing)

    @property
    def _pages(self) -> str:
        return pages_transfer(self.bootstrap_room)

    def _release(self, read: ReadPeer, transfer_id: str, detail: str = "") -> None:
        self.kv_mgr.core.release(read.peer, transfer_id, max(1, read.consumers), detail)

    def _log(self, outcome: Outcome) -> None:
        self.kv_mgr.outcome_log.write(f"room {self._named_room}", outcome)
        if outcome.failure is not None:
            aborted = outcome.aborted
            name = "aborted_loads_total" if aborted else "failed_loads_total"
            self.kv_mgr.core.recorder.add(name, () if aborted else (str(outcome.failure.code),))

    def _refuse(self, code: Code, why: str) -> None:
        failure = Failure(code, Stage.RESOLVE, f"prefill at {self.bootstrap_addr}: {why}")
        outcome = Outcome(self._pages, None, failure)
        self._log(outcome)
        self.kv_mgr.record_failure(self.bootstrap_room, outcome.error)
        self.conclude_state = KVPoll.Failed
        self.kv_mgr.update_status(self.bootstrap_room, KVPoll.Failed)
