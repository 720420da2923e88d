# SPDX-License-Identifier: Apache-2.0
"""Blocks of finished prefills, from the end of the request until no rank needs them; vLLM need not step for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.request import RequestStatus

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.integrations.vllm.held_blocks import LINGER_S, HeldBlocks
from sage_kv_connector.integrations.vllm.metadata import VLLM_HOLDS, SageKVWorkerMetadata
from sage_kv_connector.integrations.vllm.scheduler import SchedulerSide
from tests.integrations.test_vllm_orders import NO_STEP, ranks, request
from tests.integrations.vllm_workers import (
    SPEC,
    TOKENS,
    Worker,
    cache_config,
    finished,
    handed_over,
    load,
    offered,
    progress,
    vllm_config,
)

SIZE = 4


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Manager:
    """As much of vLLM's KVCacheManager as holds need, over its real pool of 15 free blocks."""

    def __init__(self) -> None:
        self.block_pool = BlockPool(16, enable_caching=True, hash_block_size=SIZE)
        self.of: dict[str, tuple[list[Any], ...]] = {}

    def get_blocks(self, request_id: str) -> Any:
        return SimpleNamespace(blocks=self.of[request_id])

    def computes(self, request_id: str, *counts: int) -> tuple[tuple[int, ...], ...]:
        """A request that got so many blocks in each group; returns its table."""
        self.of[request_id] = tuple(self.block_pool.get_new_blocks(count) for count in counts)
        return tuple(tuple(block.block_id for block in group) for group in self.of[request_id])

    def frees(self, request_id: str) -> None:
        """vLLM forgets it."""
        for group in self.of.pop(request_id):
            self.block_pool.free_blocks(reversed(group))

    @property
    def free(self) -> int:
        return int(self.block_pool.get_num_free_blocks())


def group(size: int) -> Any:
    return SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=size))


def made(count: int = 1, groups: tuple[int, ...] = (0,)) -> tuple[HeldBlocks, Manager, Clock]:
    held, manager, clock = HeldBlocks([(i, group(SIZE)) for i in groups], count), Manager(), Clock()
    held._clock = clock
    held.bind(manager)
    return held, manager, clock


def reported(*holds: int, by: int = 0) -> Any:
    meta = SageKVWorkerMetadata({hold: frozenset((by,)) for hold in holds})
    return SimpleNamespace(finished_sending=None, finished_recving=None, kv_connector_worker_meta=meta)


def test_blocks_are_free_when_vllm_and_every_rank_need_them_no_more() -> None:
    held, manager, _ = made(2)
    hold = held.hold("r", "t", manager.computes("r", 3), 3 * SIZE)
    manager.frees("r")
    assert hold != VLLM_HOLDS and manager.free == 12
    assert held.hear(reported(hold, by=1)) == []
    assert held.hear(reported(hold, by=1)) == [], "a rank's report that came twice is one rank's"
    assert manager.free == 12
    assert held.hear(reported(hold, by=0)) == ["t"]
    assert manager.free == 15
    assert held.hear(reported(hold, by=0)) == []
    assert manager.free == 15


def test_reports_of_ranks_come_together_in_one_step() -> None:
    held, manager, _ = made(2)
    first, second = (held.hold(r, r, manager.computes(r, 2), 2 * SIZE) for r in ("a", "b"))
    for one in ("a", "b"):
        manager.frees(one)
    output = reported(first, second, by=0)
    output.kv_connector_worker_meta = output.kv_connector_worker_meta.aggregate(
        reported(second, by=1).kv_connector_worker_meta
    )
    assert held.hear(output) == ["b"]
    assert manager.free == 13


def test_the_prompts_pages_alone_are_held_of_groups_that_take_part() -> None:
    held, manager, _ = made(groups=(0, 2))
    tables = manager.computes("r", 4, 2, 3)
    manager.block_pool.free_blocks([manager.of["r"][2][0]])  # a window left it behind
    manager.of["r"][2][0] = manager.block_pool.null_block
    hold = held.hold("r", "t", (tables[0], (0, *tables[2][1:])), 2 * SIZE + 1)
    before = [block.block_id for group in (0, 2) for block in manager.of["r"][group][:3] if block.block_id]
    manager.frees("r")
    still = [block.block_id for block in manager.block_pool.blocks if block.ref_cnt and not block.is_null]
    assert sorted(still) == sorted(before) and len(before) == 5
    held.hear(reported(hold))
    assert manager.free == 15


def test_a_request_id_that_comes_again_is_another_hold() -> None:
    held, manager, _ = made()
    holds = []
    for _ in range(2):
        holds.append(held.hold("r", "t", manager.computes("r", 2), 2 * SIZE))
        manager.frees("r")
    assert holds[0] != holds[1] and manager.free == 11
    assert held.hear(reported(*holds)) == ["t", "t"]
    assert manager.free == 15


def test_what_a_prompt_ends_with_is_evicted_first() -> None:
    held, manager, _ = made()
    (table,) = manager.computes("r", 3)
    for block in manager.of["r"][0]:
        manager.block_pool._insert_block_hash((b"%d" % block.block_id).ljust(36), block, SIZE)
    hold = held.hold("r", "t", (table,), 3 * SIZE)
    manager.frees("r")
    held.hear(reported(hold))
    last = [block.block_id for block in manager.block_pool.free_block_queue.get_all_free_blocks()[-3:]]
    assert last == list(reversed(table))


def test_vllm_steps_for_a_while_and_when_something_else_woke_it_up() -> None:
    held, manager, clock = made()
    assert not held.wants_step()
    hold = held.hold("r", "t", manager.computes("r", 2), 2 * SIZE)
    for _ in range(8):
        assert held.wants_step()
        held.stepped()
        clock.now += LINGER_S / 8
    assert not held.wants_step(), "nothing is computed, and nobody fetches"
    clock.now += LINGER_S
    assert held.wants_step(), "asked long after the last step: something woke vLLM up"
    held.stepped()
    assert not held.wants_step()
    held.draining = True
    assert held.wants_step()
    held.hear(reported(hold))
    assert not held.wants_step()


def test_where_vllm_gives_no_pool_it_holds_the_request_itself() -> None:
    held = HeldBlocks([(0, group(SIZE))], 1)
    assert held.hold("r", "t", ((1, 2),), 2 * SIZE) == VLLM_HOLDS
    assert not held.wants_step()
    sent = SimpleNamespace(finished_sending={"r", "another connector's"})
    assert held.hear(sent) == ["t"] and held.hear(sent) == []


# -- the scheduler's half


@pytest.mark.parametrize("bound", [True, False])
def test_vllm_may_forget_a_finished_prefill_whose_blocks_we_hold(bound: bool) -> None:
    config = vllm_config()
    side = SchedulerSide(config, cache_config(({"l0": SPEC}, SPEC)), KVTransportConfig.load({}), "engine")
    side.set_ranks(ranks(7001))
    manager = Manager()
    tables = manager.computes("r0", 3)
    if bound:
        side.bind(manager)
    one = request(0, {"do_remote_decode": True, "transfer_id": "t"})
    side.on_new_request(one)
    side.build_meta(NO_STEP)
    one.status = RequestStatus.FINISHED_LENGTH_CAPPED
    delayed, params = side.request_finished(one, tuple(list(ids) for ids in tables))
    (order,) = side.build_meta(NO_STEP).finished
    assert params is not None and (delayed, order.hold == VLLM_HOLDS) == (not bound, not bound)
    assert side.has_pending_push_work() is bound
    output = (
        reported(order.hold) if bound else SimpleNamespace(finished_sending={"r0"}, finished_recving=None)
    )
    side.update_connector_output(output)
    assert not side.has_pending_push_work()
    side.on_new_request(request(1, {"do_remote_decode": True, "transfer_id": "t"}))
    assert [offer.transfer_id for offer in side.build_meta(NO_STEP).offers] == ["t"], "its name is free again"


def test_only_a_step_that_nobody_waits_for_is_idle() -> None:
    side = SchedulerSide(
        vllm_config(), cache_config(({"l0": SPEC}, SPEC)), KVTransportConfig.load({}), "engine"
    )
    steps: tuple[dict[str, Any], ...] = {"total_num_scheduled_tokens": 3}, {"finished_req_ids": {"r"}}, {}
    found = [side.build_meta(SimpleNamespace(**{**vars(NO_STEP), **step})).idle for step in steps]
    assert found == [False, False, True]


# -- the workers' half


def test_a_worker_reports_a_hold_and_not_the_request_when_it_was_fetched() -> None:
    prefill, decode = Worker("prefill", 1, "shm"), Worker("decode", 2, "shm")
    try:
        orders = [progress("t", (1, 2, 3), TOKENS)]
        prefill.step(offers=[offered("t")], progress=orders)
        first = prefill.step(finished=[finished("t", (1, 2, 3), hold=7)])
        assert not first.released and prefill.side.worker_meta(first.released) is None
        landed = decode.step(loads=[load(prefill.prefill(), "t", [4, 5, 6])])
        decode.until(lambda one: bool(one.received), landed)
        results = prefill.until(lambda one: bool(one.released), first)
        assert (results.sent, results.released) == (set(), {7})
        assert prefill.side.worker_meta(results.released) == SageKVWorkerMetadata({7: frozenset((0,))})
        assert prefill.step(forward=False).released == set()
        assert handed_over(prefill, decode, "by vLLM", [1, 2, 3], [4, 5, 6])
    finally:
        prefill.close()
        decode.close()


@pytest.mark.parametrize("how", ["reset", "weights", "sleep", "never on offer", "no caches"])
def test_what_is_given_up_is_reported_by_its_hold(how: str) -> None:
    prefill = Worker("prefill", 1, "shm")
    try:
        last = finished("t", (1, 2, 3), hold=9)
        if how == "never on offer":
            results = prefill.step(finished=[last])
        elif how == "no caches":
            prefill.side.unregister_kv_caches()
            results = prefill.step(forward=False, finished=[last])
        else:
            prefill.step(offers=[offered("t")], progress=[progress("t", (1, 2, 3), TOKENS)])
            prefill.step(finished=[last])
            if how == "sleep":
                prefill.side.unregister_kv_caches()
            orders = {"reset": {"void": "reset"}, "weights": {"weights": "7"}}.get(how, {})
            results = prefill.step(forward=False, **orders)
        assert (results.sent, results.released) == (set(), {9})
        assert prefill.step(forward=False).released == set()
    finally:
        prefill.close()


# -- vLLM waits for what it has to end


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Any:
    from vllm.v1.engine.core import EngineCoreProc

    from sage_kv_connector.integrations.vllm.draining import follow_draining

    monkeypatch.setattr(EngineCoreProc, "has_work", EngineCoreProc.has_work)
    follow_draining()
    follow_draining()
    core: Any = object.__new__(EngineCoreProc)
    core.engines_running, core.batch_queue = False, None
    return core


def test_a_pause_waits_for_what_is_held_and_so_does_a_shutdown_with_time(core: Any) -> None:
    from vllm.v1.core.sched.interface import PauseState
    from vllm.v1.engine.core import EngineShutdownState

    held, manager, clock = made()
    hold = held.hold("r", "t", manager.computes("r", 2), 2 * SIZE)
    clock.now += 2 * LINGER_S
    held.stepped()

    def drains(draining: bool) -> None:
        held.draining = draining

    ours = SimpleNamespace(drains=drains)
    core.scheduler = SimpleNamespace(
        connector=SimpleNamespace(_connectors=[SimpleNamespace(), ours]),
        pause_state=PauseState.UNPAUSED,
        has_requests=held.wants_step,
    )
    core.vllm_config = SimpleNamespace(shutdown_timeout=30)
    core.shutdown_state = EngineShutdownState.RUNNING
    assert not core.has_work()
    for state in (PauseState.PAUSED_NEW, PauseState.PAUSED_ALL):
        core.scheduler.pause_state = state
        assert core.has_work() and not core._pause_complete()
    core.scheduler.pause_state = PauseState.UNPAUSED
    assert not core.has_work()
    core.shutdown_state = EngineShutdownState.SHUTTING_DOWN
    assert core.has_work()
    core.vllm_config.shutdown_timeout = 0
    assert not core.has_work(), "vLLM shuts down at once"
    core.scheduler.pause_state = PauseState.PAUSED_ALL
    held.hear(reported(hold))
    assert not core.has_work() and core._pause_complete()
