# SPDX-License-Identifier: Apache-2.0
"""The decode half of a worker: loads are fetched from prefill's ranks, and prefill hears what is not needed.

Methods are called on vLLM's thread unless they say otherwise.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from functools import partial

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.cache_view import KVCacheView
from sage_kv_connector.contract.failure import Code, Failure, Reason, Stage, printable
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.contract.prompt import PromptDigest
from sage_kv_connector.engine import EngineCore, PagesTarget, TransferAudit, Wanted
from sage_kv_connector.integrations.common.landing import Landing
from sage_kv_connector.integrations.common.outcome_log import OutcomeLog, Side
from sage_kv_connector.integrations.common.prefill_ranks import ReadPeer
from sage_kv_connector.integrations.vllm.completions import NOTHING, Completions, StepResults
from sage_kv_connector.integrations.vllm.metadata import Load, SageKVConnectorMetadata, Unneeded
from sage_kv_connector.integrations.vllm.prefill_directory import PrefillDirectory
from sage_kv_connector.integrations.vllm.remote_prefill import RemotePrefill
from sage_kv_connector.telemetry.recording.spans import UnreachedLoad

logger = logging.getLogger(__name__)


class _Loading:
    """A load under way. ``again``: prefill's ranks were looked up anew after they were not reached.

    ``void``: vLLM was told that it failed, whatever still comes of it.
    """

    def __init__(self, load: Load) -> None:
        self.load = load
        self.asked_at = time.monotonic()
        self.landing: Landing | None = None
        self.again = False
        self.cancelled = False
        self.void = False


class DecodeHalf:
    """Requests that wait for their KV, and those that queue for it."""

    def __init__(
        self,
        core: EngineCore,
        view: KVCacheView,
        config: KVTransportConfig,
        directory: PrefillDirectory,
        results: Completions,
        audit: TransferAudit,
    ) -> None:
        self._core = core
        self._view = view
        self._config = config
        self._directory = directory
        self._results = results
        self._audit = audit
        self._log = OutcomeLog(logger, Side.DECODE)
        self._loads: dict[str, _Loading] = {}
        self._voiding = threading.Lock()  #: what a load comes to, against that it is void
        self._expected: dict[str, RemotePrefill] = {}
        self._renewed_at = 0.0

    def __len__(self) -> int:
        return len(self._loads)

    def close(self) -> None:
        self._directory.close()

    def void(self, why: str) -> StepResults:
        """End every load; returns when nothing writes into their pages any more.

        All of them failed, also those whose pages landed since the last step.
        """
        with self._voiding:
            ended, self._loads = self._loads, {}
            for loading in ended.values():
                loading.void = True
        for loading in ended.values():
            if loading.landing is not None:
                loading.landing.stop()
        self._results.drop_received(ended)
        failure = Failure(Code.WITHDRAWN, Stage.WAIT, why)
        for request_id, loading in ended.items():
            self._count(loading.load, failure)
            outcome = Outcome(loading.load.remote.transfer_id, None, failure)
            self._log.write(request_id, outcome)
        return not_landed(loading.load for loading in ended.values())

    def begin_step(self, meta: SageKVConnectorMetadata) -> None:
        for load in meta.loads:
            loading = self._loads[load.request_id] = _Loading(load)
            self._directory.resolve(load.remote, partial(self._subscribe, loading))
        for request_id in meta.cancelled_loads:
            self._cancel(request_id)
        for unneeded in meta.releases:
            self._directory.resolve(unneeded.remote, partial(self._release, unneeded))
        self._renew(meta)

    def take(self, received: dict[str, Outcome]) -> StepResults:
        """What ended since the last step, and of the loads that failed the pages that hold nothing."""
        failed: set[str] = set()
        invalid: set[int] = set()
        for request_id, outcome in received.items():
            loading = self._loads.pop(request_id, None)
            if outcome.failure is not None and loading is not None:
                self._count(loading.load, outcome.failure)
                failed.add(request_id)
                invalid |= _page_ids(loading.load)
        return NOTHING._replace(received=set(received), failed=failed, invalid_blocks=invalid)

    def _count(self, load: Load, failure: Failure) -> None:
        recorder = self._core.recorder
        if failure.aborted:
            recorder.add("aborted_loads_total")
            return
        recorder.add("failed_loads_total", (str(failure.code),))
        tokens = max((len(pages.tokens) for pages in load.pages), default=0)
        recorder.add("recomputed_tokens_total", (str(failure.code),), tokens)

    def _subscribe(self, loading: _Loading, found: Sequence[ReadPeer] | Reason) -> None:
        """Any thread: prefill's ranks are known, or why they are not."""
        load = loading.load
        remote = load.remote
        if isinstance(found, Reason):
            failure = Failure(found.code, Stage.RESOLVE, found.detail, aborted=loading.cancelled)
            searched_s = time.monotonic() - loading.asked_at
            self._core.recorder.unreached(
                UnreachedLoad(remote.transfer_id, searched_s, found.code, found.detail, *load.trace)
            )
            self._received(loading, Outcome(remote.transfer_id, None, failure))
            return
        for read in found:
            unread = () if read.consumers else (remote.transfer_id,)
            self._let_go(read, (*unread, *remote.companions), load.prompt)
        landing = Landing(self._core, partial(self._landed, loading))
        target = PagesTarget(self._view, load.pages)
        # It runs since vLLM asked, and what was waited for until here counts.
        deadline_s = max(0.0, loading.asked_at + self._config.deadline_s - time.monotonic())
        with self._voiding:
            if loading.void:
                return
            loading.landing = landing
            if loading.cancelled:
                landing.cancel()
            wanted = Wanted(
                remote.transfer_id, target, remote.finished, deadline_s, prompt=load.prompt,
                trace=load.trace.request, offer_trace=load.trace.offer,
            )  # fmt: skip
            landing.start(
                [(peer, wanted._replace(consumers=consumers)) for peer, consumers in found if consumers]
            )

    def _landed(self, loading: _Loading, landing: Landing) -> None:
        """Control thread: every peer's transfer ended."""
        if loading.void:
            return
        outcome, load = landing.outcome(), loading.load
        if not (outcome.reached or loading.again) and self._directory.forget(load.remote):
            loading.again = True
            self._directory.resolve(load.remote, partial(self._subscribe, loading))
            return
        if outcome.ok:
            for one in landing.landed:
                self._audit.received(one.subscription, outcome)
        self._received(loading, outcome)

    def _received(self, loading: _Loading, outcome: Outcome) -> None:
        request_id = loading.load.request_id
        with self._voiding:
            if loading.void:
                return
            self._log.write(request_id, outcome)  # before vLLM acts on it
            self._results.add_received(request_id, outcome)

    def _cancel(self, request_id: str) -> None:
        loading = self._loads.get(request_id)
        if loading is not None:
            loading.cancelled = True
            if loading.landing is not None:
                loading.landing.cancel()

    def _release(self, unneeded: Unneeded, found: Sequence[ReadPeer] | Reason) -> None:
        """Any thread: nothing of this prefill is needed."""
        remote = unneeded.remote
        if isinstance(found, Reason):
            logger.warning("transfer %s can't be released: %s", printable(remote.transfer_id), found)
            return
        self._log.write(unneeded.request_id, Outcome(remote.transfer_id))
        for read in found:
            self._let_go(read, remote.transfers, unneeded.prompt)

    def _let_go(self, read: ReadPeer, transfer_ids: Sequence[str], prompt: PromptDigest) -> None:
        for transfer_id in transfer_ids:
            self._core.release(read.peer, transfer_id, max(1, read.consumers), prompt=prompt)

    def _renew(self, meta: SageKVConnectorMetadata) -> None:
        """Requests that queue here keep their pages there; a third of the lease leaves room for two misses.

        What comes from one prefill engine is renewed together: one message for each of its ranks.
        """
        for remote in meta.expected:
            self._expected[remote.transfer_id] = remote
        for transfer_id in meta.no_longer_expected:
            self._expected.pop(transfer_id, None)
        now = time.monotonic()
        if not self._expected or now - self._renewed_at < self._config.lease_s / 3:
            return
        self._renewed_at = now
        together: dict[object, list[RemotePrefill]] = {}
        for remote in self._expected.values():
            together.setdefault(remote.prefill or remote.place, []).append(remote)
        for remotes in together.values():
            transfers = tuple(transfer for remote in remotes for transfer in remote.transfers)
            self._directory.resolve(remotes[0], partial(self._renew_at, transfers))

    def _renew_at(self, transfers: tuple[str, ...], found: Sequence[ReadPeer] | Reason) -> None:
        """Any thread."""
        for peer, _ in () if isinstance(found, Reason) else found:
            self._core.renew(peer, transfers)


def not_landed(loads: Iterable[Load]) -> StepResults:
    """What vLLM hears of loads none of whose pages hold anything."""
    failed, invalid = set(), set()
    for load in loads:
        failed.add(load.request_id)
        invalid |= _page_ids(load)
    return NOTHING._replace(received=set(failed), failed=failed, invalid_blocks=invalid)


def _page_ids(load: Load) -> set[int]:
    return {page for pages in load.pages for page in pages.ids.tolist()}
