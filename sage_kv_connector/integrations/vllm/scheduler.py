# SPDX-License-Identifier: Apache-2.0
"""The scheduler's half: which requests hand KV over, and what each worker must do in this step.

A prefill request (``do_remote_decode``) is put on offer when it is first scheduled
and reported step by step, so that a subscriber can be served while it computes. A
decode request (``do_remote_prefill``) parks until its pages landed. ``transfer_id``
is the router's where it sends one, else ours; a prefill also goes by the id that its router
gave the request, which a router that asks both servers at once names to decode.
"""

from __future__ import annotations

import logging
import secrets
from typing import Any

import numpy as np
from vllm.v1.request import RequestStatus

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.bootstrap_room import RoomUses, pages_transfer, parse_room
from sage_kv_connector.engine import GroupPages, index_runs
from sage_kv_connector.integrations.vllm.cache_schema import FIRST_VERSION
from sage_kv_connector.integrations.vllm.chosen_rank import always_this_engine, follow_chosen_ranks
from sage_kv_connector.integrations.vllm.held_blocks import HeldBlocks
from sage_kv_connector.integrations.vllm.listening_ranks import ListeningRanks
from sage_kv_connector.integrations.vllm.metadata import (
    VLLM_HOLDS,
    Finished,
    Load,
    Offered,
    SageKVConnectorMetadata,
    SageKVHandshakeMetadata,
    Unneeded,
)
from sage_kv_connector.integrations.vllm.prompts import leave_out, prompt_of
from sage_kv_connector.integrations.vllm.remote_prefill import RemotePrefill, parse_remote
from sage_kv_connector.integrations.vllm.request_trace import RequestTraces
from sage_kv_connector.integrations.vllm.scheduler_offers import PrefillOffer, SchedulerOffers
from sage_kv_connector.integrations.vllm.shared_fetches import SharedFetches
from sage_kv_connector.integrations.vllm.shared_request import names_of
from sage_kv_connector.integrations.vllm.specs import (
    first_in_window,
    recurrent,
    sliding_window,
    transfer_groups,
)

logger = logging.getLogger(__name__)


class SchedulerSide:
    """Lives in vLLM's scheduler process; every method is called on its thread."""

    def __init__(
        self, vllm_config: Any, kv_cache_config: Any, config: KVTransportConfig, engine_id: str
    ) -> None:
        self._engine_id = engine_id
        self._parallel = vllm_config.parallel_config
        self._groups = transfer_groups(kv_cache_config)
        specs = [group.kv_cache_spec for _, group in self._groups]
        self._exact = any(recurrent(spec) for spec in specs)
        self._left_out = 1 if self._exact or any(sliding_window(spec) for spec in specs) else 0
        self._offers = SchedulerOffers(vllm_config, kv_cache_config)
        self._fetches = SharedFetches(vllm_config, kv_cache_config)
        self._transfer_ids: set[str] = set()
        self._room_uses = RoomUses()
        ranks = int(self._parallel.tensor_parallel_size) * int(self._parallel.pipeline_parallel_size)
        self._held = HeldBlocks(self._groups, ranks)
        self._loading: dict[str, RemotePrefill] = {}
        self._expected: dict[str, RemotePrefill] = {}
        self._goes_on: dict[str, bool] = {}
        self._next = SageKVConnectorMetadata()
        self._weights = FIRST_VERSION
        self._listening = ListeningRanks(engine_id, config, vllm_config.parallel_config)
        follow_chosen_ranks()
        self._traces = RequestTraces(on=config.otlp_endpoint is not None)

    # -- start and end

    def set_ranks(self, ranks: dict[int, SageKVHandshakeMetadata]) -> None:
        """What the workers listen on, by tensor parallel rank; starts the bootstrap server if one is asked for.

        Comes once more when vLLM woke up: the workers know nothing of what was ordered before.
        """
        if self._listening.known:
            self._offers.again(self._next)
            self._next.expected += [one for one in self._expected.values() if one not in self._next.expected]
        self._listening.set_ranks(ranks)

    def bind(self, kv_cache_manager: Any) -> None:
        """Where finished prefills' blocks are, which are held by us from now on."""
        self._held.bind(kv_cache_manager)

    def drains(self, draining: bool) -> None:
        """vLLM lets all that it has end first."""
        self._held.draining = draining

    def reset_cache(self) -> None:
        """KV of before is void, and with it what waits to be fetched and what is being fetched."""
        self._next.void = "the KV cache was reset"

    def weights_replaced(self, version: str) -> None:
        """vLLM was told what its weights are called now."""
        if version == self._weights:
            return
        self._weights = self._next.weights = version
        self._offers.again(self._next)

    def shutdown(self) -> None:
        self._listening.close()

    # -- a request's life

    def on_new_request(self, request: Any) -> None:
        """A prefill is on offer from its first moment; a producer hears early that its pages will be fetched."""
        if self._offers_prefill(request):
            return
        remote = self._remote(request)
        if remote is not None:
            self._expected[request.request_id] = remote
            self._next.expected.append(remote)
        else:
            self._next.unpaired += 1

    def num_new_matched_tokens(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """None: vLLM shall ask again in its next step."""
        self._offers_prefill(request)  # releases before 0.22 have no on_new_request
        remote, missing = self._remote(request), 0
        if remote is not None:
            tokens = self._handed_over(request, remote)
            missing = max(0, tokens - computed)
            if missing and self._fetches.waits(request, remote, computed, tokens):
                return None, False
        self._offers.expect(request.request_id, computed + missing)
        return missing, missing > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, external: int) -> None:
        remote = self._remote(request)
        if remote is None:
            return
        tokens = self._handed_over(request, remote)
        digest = prompt_of(request).digest(tokens)
        self._goes_on.pop(request.request_id, None)
        request.kv_transfer_params["do_remote_prefill"] = (
            False  # one transfer a request: a retry computes locally
        )
        self._no_longer_expected(request.request_id)
        if external <= 0:
            self._next.releases.append(Unneeded(request.request_id, remote, digest))
            return
        pages = self._wanted_pages(blocks, tokens - external, tokens)
        trace = self._traces.of_load(request)
        self._next.loads.append(Load(request.request_id, remote, pages, digest, trace))
        self._loading[request.request_id] = remote
        self._fetches.begins(request, remote, tokens - external, tokens)

    def build_meta(self, output: Any) -> SageKVConnectorMetadata:
        meta, self._next = self._next, SageKVConnectorMetadata()
        meta.idle = not (output.total_num_scheduled_tokens or output.finished_req_ids)
        self._held.stepped()
        self._fetches.stepped()
        self._offers.report(meta, output)
        return meta

    def update_connector_output(self, output: Any) -> None:
        for request_id in output.finished_recving or ():
            self._loading.pop(request_id, None)
            self._fetches.ends(request_id)
        self._transfer_ids.difference_update(self._held.hear(output))

    def request_finished(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        request_id = request.request_id
        self._offers.forget(request_id)
        self._fetches.ends(request_id)
        if self._loading.pop(request_id, None) is not None:
            self._next.cancelled_loads.append(request_id)
            return False, None
        remote = self._remote(request)
        if remote is not None:  # aborted before it was ever scheduled
            digest = prompt_of(request).digest(self._handed_over(request, remote))
            request.kv_transfer_params["do_remote_prefill"] = False
            self._goes_on.pop(request_id, None)
            self._no_longer_expected(request_id)
            self._next.releases.append(Unneeded(request.request_id, remote, digest))
            return False, None
        prefill = self._offers.pop(request_id)
        if prefill is None:
            return False, None
        good = request.status in (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)
        if not good or not any(block_ids):
            self._transfer_ids.discard(prefill.transfer_id)
            self._take_back(prefill.offered)
            return False, None
        transfer_id, tokens = prefill.transfer_id, prefill.prompt_tokens
        tables = self._offers.tables(block_ids, tokens)
        hold = self._held.hold(request_id, transfer_id, tables, tokens)
        first_token = int(request.output_token_ids[0]) if prefill.in_room else None
        self._next.finished.append(Finished(request_id, transfer_id, tables, tokens, hold, first_token))
        again = always_this_engine(request, self._engine_id, self._parallel)
        return hold == VLLM_HOLDS, self._params(prefill, again)

    def has_pending_push_work(self) -> bool:
        """Whether vLLM shall step though it has no request: for our orders, or to hear of our workers."""
        return self._next.wants_step or self._held.wants_step()

    # -- inside

    def _take_back(self, offered: Offered) -> None:
        """It won't be handed over. Where workers have not heard of it, decode may wait for it already."""
        left = [one for one in self._next.offers if one.transfer_id != offered.transfer_id]
        if len(left) < len(self._next.offers):
            self._next.given_up += sorted({offered.transfer_id, offered.family} - {""})
        self._next.offers = left
        self._next.withdrawn.append(offered.transfer_id)

    def _params(self, prefill: PrefillOffer, again: bool) -> dict[str, Any]:
        """What the router takes from prefill's answer to decode's request.

        ``again``: its next request comes to this engine too, so that it may ask decode at once then.
        """
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": prefill.transfer_id,
            "in_room": prefill.in_room,
            "remote_prompt": [prefill.prompt_tokens, prefill.offered.prompt.whole.digest.hex()],
            **self._traces.params(prefill.offered.trace, prefill.offered.family or prefill.transfer_id),
            **self._listening.params(),
            **(self._listening.push_params() if again else {}),
        }

    def _remote(self, request: Any) -> RemotePrefill | None:
        """Read and bound what a client or a router sent; None, with a warning, if it can't be used."""
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_prefill"):
            return None
        try:
            return parse_remote(params, request.request_id)
        except ValueError as error:
            logger.warning("request %s computes its prompt itself: %s", request.request_id, error)
            params["do_remote_prefill"] = False
            return None

    def _offers_prefill(self, request: Any) -> bool:
        """Whether this is a prefill to be handed over; the first time it is put on offer."""
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_decode"):
            return False
        if request.request_id not in self._offers:
            try:
                self._offer(request, params)
            except ValueError as error:
                params["do_remote_decode"] = False
                self._next.given_up += [name for name in names_of(request.request_id, params) if name]
                logger.warning("request %s is not handed over: %s", request.request_id, error)
        return True

    def _offer(self, request: Any, params: dict[str, Any]) -> None:
        named = parse_room(params, on_decode=False)
        family, shared = names_of(request.request_id, params)
        if named is not None:
            family = pages_transfer(named.room)
        own = f"{self._engine_id}-{secrets.token_hex(12)}"
        # A request's several prompts, and its several samples, come under one id.
        transfer_id = own if not family or family in self._transfer_ids else family
        if named is not None:  # SGLang's decode asks for each sample by a name of its own
            transfer_id = pages_transfer(self._room_uses.next(named.room))
        else:
            family = family or shared
            leave_out(request, self._left_out)
        prompt = prompt_of(request)
        trace = self._traces.of_request(request)
        offered = Offered(request.request_id, transfer_id, family, prompt, self._exact, trace)
        self._transfer_ids.add(transfer_id)
        self._next.offers.append(offered)
        self._offers.add(offered, request, named is not None)

    def _handed_over(self, request: Any, remote: RemotePrefill) -> int:
        """How many of a decode request's first tokens prefill computes for it.

        All that prefill can, but where this prompt goes on behind the one that prefill's answer names.
        """
        tokens = max(0, int(request.num_prompt_tokens) - self._left_out)
        there = remote.prompt
        if not 0 < there.tokens < tokens:
            return tokens
        known = self._goes_on.get(request.request_id)
        if known is None:
            known = self._goes_on[request.request_id] = prompt_of(request).digest(there.tokens) == there
        return there.tokens if known else tokens

    def _no_longer_expected(self, request_id: str) -> None:
        remote = self._expected.pop(request_id, None)
        if remote is not None:
            self._next.no_longer_expected.append(remote.transfer_id)

    def _wanted_pages(self, blocks: Any, first_token: int, prompt: int) -> tuple[GroupPages, ...]:
        """The pages that must come from the peer, null blocks left out; groups without any too."""
        wanted = []
        for group, (group_id, kv_group) in enumerate(self._groups):
            spec = kv_group.kv_cache_spec
            size = int(spec.block_size)
            first = max(first_token, first_in_window(prompt, sliding_window(spec))) // size
            table = blocks.blocks[group_id]
            chosen = [
                (i, int(block.block_id))
                for i, block in enumerate(table[: -(-prompt // size)])
                if i >= first and not getattr(block, "is_null", False)
            ]
            if chosen:
                runs = index_runs([i for i, _ in chosen])
                ids = np.array([block_id for _, block_id in chosen], dtype=np.int64)
                wanted.append(GroupPages(group, runs, ids, range(runs[0][0] * size, prompt)))
        return tuple(wanted)
