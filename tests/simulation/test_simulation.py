# SPDX-License-Identifier: Apache-2.0
"""The simulation finds what is wrong, says the same each time, and finds nothing in the engine as it is."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator

import pytest

from sage_kv_connector import _data_plane
from tests.simulation.planted import PLANTED
from tests.simulation.schedule import drawn
from tests.simulation.shrink import shrunk, wrong_of
from tests.simulation.world import World

pytestmark = pytest.mark.skipif(
    not hasattr(_data_plane, "SteppedEndpoint"), reason="the data plane was built without SAGE_KVT_SIMULATION"
)

#: ``make simulate`` runs far more.
SCHEDULES = 400
#: Each planted fault is seen within so many.
PLANTED_SCHEDULES = 3000


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What goes wrong there is logged thousands of times."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_the_engine_keeps_its_promises_in_every_schedule() -> None:
    results = [World(drawn(seed)).run() for seed in range(SCHEDULES)]
    assert [(seed, result.wrong) for seed, result in enumerate(results) if result.wrong] == []
    assert sum(result.right for result in results) > SCHEDULES / 2


@pytest.mark.usefixtures("collected")
def test_nothing_of_a_world_is_left_in_the_process() -> None:
    """A million of them run in one."""

    def open_now() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    before = open_now()
    restarted = 0
    for seed in range(50):
        world = World(drawn(seed))
        world.run()
        restarted += len(world.servers) - world.schedule.prefills - world.schedule.decodes
    assert restarted > 10
    assert open_now() == before


def test_a_seed_always_gives_the_same_run() -> None:
    for seed in range(20):
        first, second = World(drawn(seed)).run(), World(drawn(seed)).run()
        assert first == second


@pytest.mark.parametrize("name", sorted(PLANTED))
def test_a_planted_fault_is_found(name: str) -> None:
    with PLANTED[name]():
        assert any(wrong_of(drawn(seed)) for seed in range(PLANTED_SCHEDULES))


def test_a_failing_schedule_is_made_smaller() -> None:
    with PLANTED["window_left_open"]():
        seed = next(seed for seed in range(100) if wrong_of(drawn(seed)) and len(drawn(seed).requests) > 2)
        small = shrunk(drawn(seed))
        assert wrong_of(small)
    assert len(small.requests) == 1
    assert not small.faults
