# SPDX-License-Identifier: Apache-2.0
"""Makes a schedule that fails smaller: what it does without is left out, as long as it still fails."""

from __future__ import annotations

from collections.abc import Iterator

from tests.simulation.schedule import Schedule
from tests.simulation.world import World


def wrong_of(schedule: Schedule) -> tuple[str, ...]:
    """What did not hold; a run that ends with an exception is wrong, too."""
    try:
        return World(schedule).run().wrong
    except Exception as error:
        return (f"{type(error).__name__}: {error}",)


def shrunk(schedule: Schedule, tries: int = 300) -> Schedule:
    """It fails, too. At most ``tries`` runs."""
    left = tries
    while True:
        for smaller in _smaller(schedule):
            left -= 1
            if left < 0:
                return schedule
            if wrong_of(smaller):
                schedule = smaller
                break
        else:
            return schedule


def _smaller(schedule: Schedule) -> Iterator[Schedule]:
    for i in range(len(schedule.faults)):
        yield schedule._replace(faults=schedule.faults[:i] + schedule.faults[i + 1 :])
    requests = schedule.requests
    for i, request in enumerate(requests):
        if len(requests) > 1:
            yield schedule._replace(requests=requests[:i] + requests[i + 1 :])
        for j in range(len(request.loads)):
            fewer = request._replace(loads=request.loads[:j] + request.loads[j + 1 :])
            yield schedule._replace(requests=(*requests[:i], fewer, *requests[i + 1 :]))
        if request.steps > 1:
            simpler = request._replace(steps=1)
            yield schedule._replace(requests=(*requests[:i], simpler, *requests[i + 1 :]))
    options = schedule.options
    for plainer in (
        options._replace(corrupt=0),
        options._replace(duplicate=0),
        options._replace(lanes=1),
        options._replace(packets=8),
        options._replace(longest_s=1e-4),
    ):
        if plainer != options:
            yield schedule._replace(options=plainer)
