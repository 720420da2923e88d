# SPDX-License-Identifier: Apache-2.0
"""What must hold after a run: who must have been right, who is told in time, and how long pages are held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from sage_kv_connector.engine.session.session import PROBE_S
from tests.simulation.decode import SLACK_S, DecodeLoad
from tests.simulation.prefill import PrefillRequest
from tests.simulation.schedule import HARMLESS
from tests.simulation.stepped import BEGINNING_NS, CHUNK_BYTES

if TYPE_CHECKING:
    from tests.simulation.schedule import Schedule
    from tests.simulation.world import World

#: A dead connection is noticed within this time after it was idle.
NOTICED_S = 2.0
_BYTES_A_TOKEN = 2 * 2 * 2 * 32 * 2


def wrong_at_the_end(
    world: World, prefills: Sequence[PrefillRequest], loads: Sequence[DecodeLoad]
) -> Iterator[str]:
    for load in loads:
        yield from load.unanswered()
    for prefill in prefills:
        yield from prefill.unanswered()
        of_request = [load for load in loads if load.prefill is prefill]
        yield from _held_too_long(world, prefill, of_request)
        if is_calm(world.schedule) or is_cut_only(world.schedule, loads):
            yield from _should_be_right(world.schedule, prefill, of_request)
        if is_calm(world.schedule):
            yield from _told_too_late(world.schedule, prefill, of_request)


def is_calm(schedule: Schedule) -> bool:
    """Nothing goes wrong but what requests do themselves, and peers that mean harm."""
    harmless = all(fault.kind in HARMLESS for fault in schedule.faults)
    return harmless and not schedule.options.corrupt and not schedule.options.duplicate


def is_cut_only(schedule: Schedule, loads: Sequence[DecodeLoad]) -> bool:
    """Links break, once: with a word, or without one while nothing goes over them."""
    if len(schedule.faults) != 1 or schedule.options.corrupt or schedule.options.duplicate:
        return False
    fault = schedule.faults[0]
    at = BEGINNING_NS / 1e9 + fault.at_s
    if fault.kind == "cut_silently" and schedule.options.peer_timeout_s > PROBE_S:
        busy = [
            load for load in loads if load.asked_at - 0.1 < at < (load.answered_at or at) + moving_s(schedule)
        ]
        return not busy
    return fault.kind == "cut"


def may_connect(schedule: Schedule) -> bool:
    """No handshake takes longer than it may."""
    return schedule.options.connect_timeout_s >= 16 * schedule.options.longest_s


def moving_s(schedule: Schedule) -> float:
    """Longer than any hand-over takes on this wire, its session included."""
    tokens = sum(request.tokens * len(request.loads) for request in schedule.requests)
    packets = 20 + 8 * len(schedule.requests) + 3 * tokens * _BYTES_A_TOKEN / CHUNK_BYTES
    return 1.0 + 2 * packets * schedule.options.longest_s


def _should_be_right(
    schedule: Schedule, prefill: PrefillRequest, loads: Sequence[DecodeLoad]
) -> Iterator[str]:
    """Whoever comes in time gets what prefill computed, over another session if the first one breaks."""
    request, options, moving = prefill.request, schedule.options, moving_s(schedule)
    allowed = {"memory"}  # no staging memory holds a part
    if schedule.faults:
        moving += NOTICED_S
        if options.pulls:  # what was in flight is void, which may be seen before the end of the session
            allowed.add("landing")
    if not may_connect(schedule):
        return
    if request.how != "finished" or prefill.finished_at is None or prefill.offered_at is None:
        return
    for load in loads:
        if not load.asked or load.load.cancel_s or load.load.other_prompt or not load.answers:
            continue
        waits_for_offer = prefill.offered_at - load.asked_at
        since_end = load.asked_at - prefill.finished_at
        end = max(load.asked_at, prefill.finished_at) + moving
        in_time = waits_for_offer < options.unmatched_timeout_s - 2 * options.longest_s
        if in_time and since_end < options.lease_s - moving and end < load.asked_at + load.load.deadline_s:
            outcome = load.answers[0]
            code = outcome.failure.code if outcome.failure else ""
            moved = outcome.failure is not None and "bytes had moved" in outcome.failure.detail
            # Over a link that broke behind the last byte's leaving prefill has nothing more to give.
            late_cut = code == "unknown_transfer" and prefill.served and not options.pulls
            under_load = any(load.asked_at < BEGINNING_NS / 1e9 + fault.at_s for fault in schedule.faults)
            lost = (code == "session_lost" and moved) or (late_cut and under_load)
            if outcome.stats is None and code not in allowed and not lost:
                yield f"{load.name}: {outcome.failure}, and nothing went wrong"
            elif load.answered_at is not None and load.answered_at > end:
                yield f"{load.name}: answered {load.answered_at - end:.1f} s later than a hand-over takes"


def _told_too_late(schedule: Schedule, prefill: PrefillRequest, loads: Sequence[DecodeLoad]) -> Iterator[str]:
    """Who waits for what never comes hears so: at once if prefill knows it, else after the time for that."""
    request, moving = prefill.request, moving_s(schedule)
    for load in loads:
        if load.answered_at is None or load.satisfied:
            continue
        if prefill.offered_at is None:
            bound = load.asked_at + schedule.options.unmatched_timeout_s + moving
        elif request.how in ("given_up", "withdrawn") and prefill.ended_at is not None:
            bound = max(load.asked_at, prefill.ended_at) + moving
        else:
            continue
        if load.answered_at > bound:
            yield f"{load.name}: told {load.answered_at - bound:.1f} s too late that prefill does not come"


def _held_too_long(world: World, prefill: PrefillRequest, loads: Sequence[DecodeLoad]) -> Iterator[str]:
    """Pages are free soon after the last of those who wanted them; after a lease if one of them never came."""
    request, options, schedule = prefill.request, world.schedule.options, world.schedule
    server = prefill.server
    if server is None or prefill.released_at is None or prefill.finished_at is None:
        return
    ends = [load.ended_at for load in loads if load.ended_at is not None]
    last = max([prefill.finished_at, *ends])
    satisfied = len(loads) >= request.consumers and all(load.satisfied for load in loads)
    # Who declines says so over a session.
    everybody = request.how == "finished" and is_calm(schedule) and may_connect(schedule) and satisfied
    bound = last + SLACK_S + moving_s(schedule) + world.lost_s(server)
    if not everybody:
        bound += options.lease_s + 2 * options.peer_timeout_s + options.connect_timeout_s
        bound += sum(fault.for_s for fault in schedule.faults)
    if any(load.load.renews for load in loads):
        bound += options.lease_s
    if prefill.released_at > bound:
        yield (
            f"{prefill.transfer_id}: its pages were free {prefill.released_at - last:.1f} s after the last "
            f"consumer ended, at most {bound - last:.1f} s are right"
        )
