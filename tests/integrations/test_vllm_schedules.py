# SPDX-License-Identifier: Apache-2.0
"""What is posted is what was computed, whatever vLLM's scheduler does; ``scripts/stress_schedules.py`` runs it long."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.request import RequestStatus

from sage_kv_connector.contract.prompt import Prompt
from sage_kv_connector.integrations.vllm.metadata import Offered, SageKVConnectorMetadata
from sage_kv_connector.integrations.vllm.scheduler_offers import SchedulerOffers
from tests.integrations.simulated_vllm import VARIANTS, Simulation, Variant

STEPS = 150


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_posted_pages_are_final(variant: Variant) -> None:
    posted = completed = sleeps = asleep = 0
    for seed in range(2):
        simulation = Simulation(seed, variant)
        for _ in range(STEPS):
            simulation.step()
        simulation.end()
        assert simulation.differences == []
        posted, completed = posted + simulation.posted, completed + simulation.completed
        sleeps, asleep = sleeps + simulation.sleeps, asleep + simulation.asleep
    assert posted > 50
    assert completed > 10
    assert asleep > 10
    assert sleeps > 0 or variant.others == "async"  # vLLM refuses while a request waits for a load


@pytest.mark.parametrize("variant", [Variant(), Variant(others="sync")], ids=lambda variant: variant.name)
def test_the_simulation_finds_pages_that_were_called_final_too_early(variant: Variant) -> None:
    for seed in range(10):
        simulation = Simulation(seed, variant, old_rule=True)
        for _ in range(100):
            simulation.step()
            if simulation.differences:
                return
    pytest.fail("1,000 schedules with the old rule made no difference")


def test_the_simulation_finds_pages_that_were_freed_when_one_rank_needed_them_no_more() -> None:
    for seed in range(20):
        simulation = Simulation(seed, Variant(ranks=2), first_rank=True)
        for _ in range(100):
            simulation.step()
            if simulation.differences:
                return
    pytest.fail("2,000 schedules with one rank's word for all made no difference")


def _step(request_id: str, computed: int, scheduled: int, new_ids: object, *, first: bool = False) -> Any:
    new = (
        [SimpleNamespace(req_id=request_id, num_computed_tokens=computed, block_ids=new_ids)] if first else []
    )
    cached = SimpleNamespace(
        req_ids=[] if first else [request_id],
        resumed_req_ids=set(),
        num_computed_tokens=[computed],
        new_block_ids=[new_ids],
    )
    return SimpleNamespace(
        scheduled_new_reqs=new, scheduled_cached_reqs=cached, num_scheduled_tokens={request_id: scheduled}
    )


def test_tokens_taken_back_begin_a_new_run_over_the_same_blocks() -> None:
    spec = SimpleNamespace(block_size=4)
    caches = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)])
    offers = SchedulerOffers(SimpleNamespace(cache_config=SimpleNamespace(block_size=4)), caches)
    request = SimpleNamespace(
        request_id="r", num_prompt_tokens=20, max_tokens=1, status=RequestStatus.RUNNING
    )
    offered = Offered("r", "t", "", Prompt(range(20)), False)
    offers.add(offered, request, False)
    meta = SageKVConnectorMetadata()
    offers.report(meta, _step("r", 0, 8, ([5, 6],), first=True))
    offers.report(meta, _step("r", 8, 8, ([7, 8],)))
    assert meta.withdrawn == []
    offers.report(meta, _step("r", 4, 4, None))  # blocks from the second on turned out to be invalid
    assert (meta.withdrawn, meta.offers) == (["t"], [offered])
    assert [(one.new_page_ids, one.tokens_after) for one in meta.progress] == [
        (((5, 6),), 8),
        (((7, 8),), 16),
        (((5, 6, 7, 8),), 8),
    ]
