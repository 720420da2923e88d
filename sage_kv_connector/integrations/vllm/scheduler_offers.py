# SPDX-License-Identifier: Apache-2.0
"""The scheduler's prefills on offer: what each step makes of their pages, as orders to the workers.

A prefill's *run* is a block table that only grows while computed tokens only grow. What ends a run (preemption,
a reset with running requests, blocks that another connector failed to load, a table given anew) makes void what
was handed out of it: the transfer is withdrawn before the step's forward pass, and starts over.

A prefill *streams* where every token that the scheduler counts as computed is certain once the step's forward
pass ran. Where another connector loads beside ours (MultiConnector, which tells its children nothing of each other),
tokens that a prefill begins with may be what failed to load, which is known after the step; and some vLLM write to
given-up blocks before a connector hears of it. Such a prefill is handed over when it finished.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from vllm.v1.request import RequestStatus

from sage_kv_connector.integrations.vllm.metadata import (
    Offered,
    PageTables,
    Progress,
    SageKVConnectorMetadata,
)
from sage_kv_connector.integrations.vllm.specs import first_in_window, sliding_window, transfer_groups

logger = logging.getLogger(__name__)


class PrefillOffer:
    """One request on offer. ``in_room``: decode may be an engine that needs its first token."""

    def __init__(self, offered: Offered, request: Any, in_room: bool) -> None:
        self.offered = offered
        self.request = request
        self.in_room = in_room
        #: Of this run: block ids by vLLM's group, and tokens computed once the steps scheduled so far ran.
        self.tables: list[list[int]] | None = None
        self.tokens = 0
        self.streams = True

    @property
    def transfer_id(self) -> str:
        return self.offered.transfer_id

    @property
    def prompt_tokens(self) -> int:
        return self.offered.prompt.tokens


class SchedulerOffers:
    """Lives in vLLM's scheduler process; every method is called on its thread."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        self._groups = transfer_groups(kv_cache_config)
        self._block_size = int(vllm_config.cache_config.block_size)
        self._expected: dict[str, int] = {}
        self._others_load = False
        self._may_stream = not _writes_before_orders(vllm_config, kv_cache_config)
        self._offers: dict[str, PrefillOffer] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._offers

    def add(self, offered: Offered, request: Any, in_room: bool) -> None:
        self._offers[request.request_id] = PrefillOffer(offered, request, in_room)

    def pop(self, request_id: str) -> PrefillOffer | None:
        return self._offers.pop(request_id, None)

    def expect(self, request_id: str, computed: int) -> None:
        """A request will begin with so many tokens from vLLM's prefix cache and from us."""
        self._expected[request_id] = computed

    def forget(self, request_id: str) -> None:
        self._expected.pop(request_id, None)

    def report(self, meta: SageKVConnectorMetadata, output: Any) -> None:
        """What this step does to each prefill on offer."""
        self._notice_others(output)
        if not self._offers:
            return
        for offer in self._offers.values():
            # A preempted one may wait for another connector's load by now.
            if offer.tables is not None and offer.request.status != RequestStatus.RUNNING:
                self._end_run(meta, offer, "was preempted")
        for request_id, computed, new_ids, anew in _scheduled(output):
            if request_id in self._offers:
                scheduled = int(output.num_scheduled_tokens[request_id])
                self._step(meta, self._offers[request_id], computed, scheduled, new_ids, anew)

    def again(self, meta: SageKVConnectorMetadata) -> None:
        """Workers gave up what was on offer: what has not begun (anew) is put on offer once more.

        What runs goes on in memory that nobody can vouch for; it ends without being handed over.
        """
        known = {offered.transfer_id for offered in meta.offers}
        for offer in self._offers.values():
            if offer.request.status != RequestStatus.RUNNING:
                offer.tables = None
                if offer.transfer_id not in known:
                    meta.offers.append(offer.offered)

    def tables(self, block_ids: Any, tokens: int) -> PageTables:
        """Of the groups that take part; pages that a window had left behind after ``tokens`` have no memory."""
        return self._tables(block_ids, tokens, [0] * len(block_ids))

    def _tables(self, block_ids: Any, tokens: int, first: list[int]) -> PageTables:
        """The same, each group's pages from ``first`` on."""
        return tuple(
            _kept(block_ids[group_id], group.kv_cache_spec, tokens, first[group_id])
            for group_id, group in self._groups
        )

    def _step(
        self,
        meta: SageKVConnectorMetadata,
        offer: PrefillOffer,
        computed: int,
        scheduled: int,
        new_ids: Any,
        anew: bool,
    ) -> None:
        prompt = offer.prompt_tokens
        tables = [] if anew else offer.tables or []
        if offer.tables is not None and (anew or computed < min(offer.tokens, prompt)):
            self._end_run(meta, offer, "started over")
        known = [len(table) for table in offer.tables or ()]  # by the workers
        if offer.tables is None:
            offer.tables = tables or [[] for _ in new_ids]
            offer.streams = self._may_stream and not (self._others_load and computed)
            known = [0] * len(offer.tables)
        for table, ids in zip(offer.tables, new_ids or (), strict=False):
            table.extend(ids)
        offer.tokens = computed + scheduled
        final = min(offer.tokens, prompt) if offer.streams else 0
        # While it runs, vLLM may take a window's blocks back up to its last token.
        last = prompt + int(getattr(offer.request, "max_tokens", None) or 1) - 1
        meta.progress.append(
            Progress(
                offer.request.request_id,
                offer.transfer_id,
                self._tables(offer.tables, last, known),
                final,
                final == prompt,
            )
        )

    def _notice_others(self, output: Any) -> None:
        """Whether a request begins with whole blocks that are neither vLLM's nor ours. Once is enough."""
        for request_id, computed, _, _ in _scheduled(output):
            expected = self._expected.pop(request_id, None)
            if expected is not None and computed // self._block_size > expected // self._block_size:
                self._others_load = True

    def _end_run(self, meta: SageKVConnectorMetadata, offer: PrefillOffer, why: str) -> None:
        """Whatever was streamed is void; who fetched it recomputes."""
        meta.withdrawn.append(offer.transfer_id)
        meta.offers.append(offer.offered)
        offer.tables = None
        logger.info("prefill %s %s; its transfer starts over", offer.request.request_id, why)


def _scheduled(output: Any) -> Iterator[tuple[str, int, Any, bool]]:
    """(request, computed tokens before the step, new block ids by group, whether these are its whole table)."""
    for new in output.scheduled_new_reqs:
        yield new.req_id, int(new.num_computed_tokens), new.block_ids, True
    cached = output.scheduled_cached_reqs
    resumed = getattr(cached, "resumed_req_ids", None)
    for i, request_id in enumerate(cached.req_ids):
        anew = request_id in resumed if resumed is not None else bool(cached.resumed_from_preemption[i])
        yield request_id, int(cached.num_computed_tokens[i]), cached.new_block_ids[i], anew


def _kept(block_ids: Any, spec: Any, tokens: int, first: int) -> tuple[int, ...]:
    """A group's blocks from ``first`` on, with 0, vLLM's null block, for those that lie behind its window."""
    window = sliding_window(spec)
    behind = first_in_window(tokens, window) // int(spec.block_size)
    nulls = max(0, min(behind, len(block_ids)) - first)
    return (0,) * nulls + tuple(block_ids[first + nulls :])


def _writes_before_orders(vllm_config: Any, kv_cache_config: Any) -> bool:
    """Whether new blocks are zeroed or copied to before the worker's connector is told what was given up.

    vLLM's second model runner does so (``update_requests`` before ``pre_forward``); the first one calls
    ``handle_preemptions`` before both.
    """
    if not getattr(vllm_config, "use_v2_model_runner", False):
        return False
    several = len(kv_cache_config.kv_cache_groups) > 1
    return several or bool(getattr(kv_cache_config, "needs_kv_cache_zeroing", False))
