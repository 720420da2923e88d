# SPDX-License-Identifier: Apache-2.0
"""The prefill half of a worker: prefills on offer follow the scheduler's progress, and are freed when fetched.

One rule says when a page is final: **a page of a layer is final when the forward pass ran after which the
scheduler counts all its tokens as computed**, never before, whoever wrote it: this request, another one of the
same step or of a step before, or another connector. A worker runs its steps in order, so at the end of a pass
whatever any earlier step was to write is written. What the scheduler can't vouch for even then is
reported with no tokens until the prefill finished (``scheduler_offers.py``).

Methods are called on vLLM's thread unless they say otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from functools import partial

import numpy as np

from sage_kv_connector.contract.cache_view import KVCacheView
from sage_kv_connector.contract.failure import Code, Reason
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.engine import (
    NULL_PAGE,
    EngineCore,
    OfferTerms,
    PagedSource,
    PageIds,
    Step,
    TransferAudit,
)
from sage_kv_connector.integrations.common.compute_events import ComputeEvents
from sage_kv_connector.integrations.common.outcome_log import OutcomeLog, Side
from sage_kv_connector.integrations.vllm.completions import Completions
from sage_kv_connector.integrations.vllm.first_token import FirstTokenOffers
from sage_kv_connector.integrations.vllm.metadata import VLLM_HOLDS, Finished, Offered, Progress

logger = logging.getLogger(__name__)

#: vLLM's block 0 stands for "no memory"; there is memory, but never anybody's KV.
VLLM_NULL_BLOCK = 0


class _OnOffer:
    """A prefill of this worker. ``hold``: who keeps its pages once it finished."""

    def __init__(self, request_id: str, source: PagedSource) -> None:
        self.request_id = request_id
        self.source = source
        self.finished = False
        self.hold = VLLM_HOLDS


class PrefillHalf:
    """``computed``: of a device, where vLLM has only launched what it says is written; None for host memory."""

    def __init__(
        self,
        core: EngineCore,
        view: KVCacheView,
        results: Completions,
        audit: TransferAudit,
        computed: ComputeEvents | None = None,
    ) -> None:
        self._core = core
        self._view = view
        self._results = results
        self._audit = audit
        self._log = OutcomeLog(logger, Side.PREFILL)
        self._computed = computed
        self._first_tokens = FirstTokenOffers(core)
        self._layer_place = {
            layer.name: (group, index)
            for group, layers in enumerate(view.groups)
            for index, layer in enumerate(layers.layers)
        }
        self._on_offer: dict[str, _OnOffer] = {}
        self._in_step: Sequence[Progress] = ()
        self._step = Step()  #: what becomes final in it

    def __len__(self) -> int:
        return len(self._on_offer)

    @property
    def waits_for_decode(self) -> bool:
        """Whether a finished prefill is still to be fetched."""
        return any(offer.finished for offer in self._on_offer.values())

    def withdraw(self, transfer_ids: Sequence[str]) -> None:
        """Returns when nothing reads their pages any more."""
        for transfer_id in transfer_ids:
            self._on_offer.pop(transfer_id, None)
        self._core.withdraw(transfer_ids, "prefill was aborted or preempted")

    def give_up(self, names: Sequence[str]) -> None:
        """Whoever waits for what never came on offer hears that it won't."""
        if names:
            self._core.give_up(names, Reason(Code.WITHDRAWN, "prefill was aborted before it began"))

    def void(self, detail: str, *, only_finished: bool = False, again: Collection[str] = ()) -> None:
        """Give up what is on offer, or what of it is finished; returns when nothing reads its pages any more.

        Whoever asks for it later hears at once why, but for those that come on offer ``again``.
        """
        offers = {i: one for i, one in list(self._on_offer.items()) if one.finished or not only_finished}
        for transfer_id, offer in offers.items():
            if self._on_offer.pop(transfer_id, None) is offer and offer.finished:
                self._results.add_sent(offer.request_id, offer.hold)
        self._core.withdraw([i for i in offers if i in again], detail)
        self._core.give_up([i for i in offers if i not in again], Reason(Code.WITHDRAWN, detail))

    def begin_step(self, offers: Sequence[Offered], steps: Sequence[Progress]) -> None:
        """Before the forward pass: new offers, and the block tables of this step. Nothing becomes final here."""
        for offered in offers:
            self._offer(offered)
        self._in_step = [progress for progress in steps if progress.transfer_id in self._on_offer]
        sizes = [group.page_size for group in self._view.groups]
        self._step = Step()
        for progress in self._in_step:
            source = self._on_offer[progress.transfer_id].source
            for group, ids in enumerate(progress.new_page_ids):
                if ids:
                    source.grow(group, _table(ids))
            after = progress.tokens_after
            pages = tuple(-(-after // size) if progress.complete else after // size for size in sizes)
            if progress.complete:
                source.end(pages)
            self._step.add(source.tables, pages)

    def layer_saved(self, layer_name: str) -> None:
        """A layer's KV of this step is written: stream it to whoever subscribed already."""
        place = self._layer_place.get(layer_name)
        if place is None or not self._in_step:
            return
        if self._computed is None:
            self._step.layer(*place)
            self._advanced(self._in_step)
        elif any(self._core.is_streaming(progress.transfer_id) for progress in self._in_step):
            self._when_computed(self._computed, partial(self._step.layer, *place))

    def end_forward(self) -> None:
        """After the forward pass every layer of the step is written."""
        if self._computed is None:
            self._step.all()
            self._advanced(self._in_step)
        elif self._in_step:
            self._when_computed(self._computed, self._step.all)
        self._in_step, self._step = (), Step()

    def close(self) -> None:
        """Nothing becomes final any more."""
        if self._computed is not None:
            self._computed.close()

    def finish(self, finished: Finished) -> None:
        """A prefill ended well: its pages are held until they were fetched or the lease is over."""
        offer = self._on_offer.get(finished.transfer_id)
        if offer is None:  # released or withdrawn before: nothing holds the pages
            self._results.add_sent(finished.request_id, finished.hold)
            return
        offer.finished, offer.hold = True, finished.hold
        pages = tuple(-(-finished.tokens // group.page_size) for group in self._view.groups)
        for group, ids in enumerate(finished.page_ids):
            offer.source.set_pages(group, _table(ids))
        offer.source.end(pages)
        offer.source.advance_all(pages)
        self._core.finish(finished.transfer_id)
        if finished.first_token is not None:
            self._first_tokens.offer(finished.transfer_id, finished.first_token)

    def _when_computed(self, computed: ComputeEvents, make_final: Callable[[], None]) -> None:
        in_step = self._in_step

        def final() -> None:
            make_final()
            self._advanced(in_step)

        def failed(error: str) -> None:
            logger.error("what vLLM computed on the device is lost: %s", error)
            ids = [progress.transfer_id for progress in in_step]
            self._core.give_up(ids, Reason(Code.WITHDRAWN, f"prefill's device failed: {error}"))

        computed.behind(final, failed)

    def _advanced(self, in_step: Sequence[Progress]) -> None:
        for progress in in_step:
            self._core.advanced(progress.transfer_id)

    def _offer(self, offered: Offered) -> None:
        offer = _OnOffer(offered.request_id, PagedSource(self._view, VLLM_NULL_BLOCK))
        self._on_offer[offered.transfer_id] = offer
        released = partial(self._released, offered.transfer_id, offer)
        terms = OfferTerms(
            family=offered.family, prompt=offered.prompt, exact=offered.exact, trace=offered.trace
        )
        self._core.offer(offered.transfer_id, offer.source, released, terms)

    def _released(self, transfer_id: str, offer: _OnOffer, outcome: Outcome) -> None:
        """Control thread: the pages of an offer are free."""
        if outcome.stats is not None:
            self._audit.sent(offer.source, outcome)
        if outcome.failure is not None and not outcome.aborted:
            self._core.recorder.add("failed_offers_total", (str(outcome.failure.code),))
        self._log.write(offer.request_id, outcome)
        if self._on_offer.get(transfer_id) is not offer or self._on_offer.pop(transfer_id, None) is not offer:
            return  # withdrawn: vLLM has its pages already
        if offer.finished:
            self._results.add_sent(offer.request_id, offer.hold)


def _table(ids: Sequence[int]) -> PageIds:
    """vLLM's block ids as the transport's."""
    table = np.asarray(ids, dtype=np.int64)
    return np.where(table == VLLM_NULL_BLOCK, NULL_PAGE, table)
