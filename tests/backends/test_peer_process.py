# SPDX-License-Identifier: Apache-2.0
"""Two processes: bytes cross, and a peer that dies or stops costs no more than it must."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator

import pytest

from sage_kv_connector.backends.base import EventKind, Status
from tests.backends.kinds import Kind
from tests.backends.pair import of_kind, settle, until, until_event
from tests.backends.peer import Peer, end, spawn, stop

BIG = 64 << 20
DEATH_NOTICED_S = 2.0


@pytest.fixture
def peer(kind: Kind) -> Iterator[Peer]:
    made = Peer(kind)
    yield made
    made.close()


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system


@pytest.mark.any_memory
def test_bytes_cross_in_both_directions(peer: Peer) -> None:
    descriptor = peer.open(BIG)
    post = peer.post(descriptor, BIG, fill=5)
    window, mine, memory = peer.window(BIG)
    peer.order(post=BIG, descriptor=mine.hex(), fill=9)
    events = until(peer.backend, lambda all: len(of_kind(all, EventKind.MESSAGE)) == 2)
    ends = [
        (m["ended"], m["status"])
        for m in map(json.loads, (e.payload for e in of_kind(events, EventKind.MESSAGE)))
    ]
    assert sorted(ends) == [(EventKind.SENT, Status.OK), (EventKind.WINDOW_DONE, Status.OK)]
    events += settle(peer.backend, 0.1)
    assert [e.status for e in of_kind(events, EventKind.SENT, post)] == [Status.OK]
    assert of_kind(events, EventKind.WINDOW_DONE, window)
    assert (peer.places.seen(memory) == 9).all()


def test_the_mode_between_processes(kind: Kind, peer: Peer) -> None:
    info = peer.backend.connection_info(peer.connection)
    if kind.mode == "direct" and info.mode != "direct":
        pytest.skip(f"this machine forbids it: {info.reason}")
    assert not kind.mode or info.mode == kind.mode


def test_kill_while_it_sends(peer: Peer) -> None:
    window, descriptor, _ = peer.window(BIG, notify_chunks=True)
    peer.order(post=BIG, descriptor=descriptor.hex(), fill=1)
    until_event(peer.backend, EventKind.LANDED, window)
    peer.signal(signal.SIGKILL)
    events = peer.until_closed(DEATH_NOTICED_S)
    ends = [e for e in events if e.kind in (EventKind.WINDOW_DONE, EventKind.WINDOW_FAILED)]
    assert [e.id for e in ends] == [window]
    if ends[0].kind == EventKind.WINDOW_FAILED:
        assert ends[0].status == Status.CONNECTION_LOST
    assert (events[-1].kind, events[-1].status) == (EventKind.CLOSED, Status.CONNECTION_LOST)
    assert settle(peer.backend) == []


@pytest.mark.any_memory
def test_kill_while_it_receives(peer: Peer) -> None:
    descriptor = peer.open(BIG)
    stop(peer.process)
    post = peer.post(descriptor, BIG)
    time.sleep(0.05)
    peer.signal(signal.SIGKILL)
    events = peer.until_closed(DEATH_NOTICED_S)
    assert [(e.id, e.status) for e in of_kind(events, EventKind.SENT)] == [(post, Status.CONNECTION_LOST)]
    assert (events[-1].kind, events[-1].status) == (EventKind.CLOSED, Status.CONNECTION_LOST)
    assert settle(peer.backend) == []


def test_kill_of_an_idle_peer(peer: Peer) -> None:
    settle(peer.backend, 0.1)
    peer.signal(signal.SIGKILL)
    assert [e.kind for e in peer.until_closed(DEATH_NOTICED_S)] == [EventKind.CLOSED]


@pytest.mark.any_memory
def test_a_stopped_peer_does_not_make_us_spin(peer: Peer) -> None:
    descriptor = peer.open(BIG)
    stop(peer.process)
    posts = [peer.post(descriptor, BIG)]
    window, mine, _ = peer.window(1 << 20)
    peer.order(post=1 << 20, descriptor=mine.hex(), fill=1)
    settle(peer.backend, 0.2)
    before, begun = _cpu_s(), time.monotonic()
    while time.monotonic() - begun < 1.5:
        assert not peer.backend.wait(0.5)
    assert _cpu_s() - before < 0.15
    peer.signal(signal.SIGCONT)
    # Over a path, what the peer says of an end may come before that end.
    events = until(
        peer.backend,
        lambda all: len(of_kind(all, EventKind.MESSAGE)) == 2 and bool(of_kind(all, EventKind.SENT)),
    )
    assert [e.id for e in of_kind(events, EventKind.SENT)] == posts
    assert of_kind(events, EventKind.WINDOW_DONE, window)


def test_small_posts_to_a_stopped_peer_all_end_when_it_goes_on(peer: Peer) -> None:
    """Posts that leave from the caller's thread until nothing more fits, and then nothing else happens."""
    size, count = 48 << 10, 600
    descriptor = peer.open(size * count)
    stop(peer.process)
    posts = []
    for _ in range(count):
        posts.append(peer.post(descriptor, size))
    time.sleep(0.2)
    peer.signal(signal.SIGCONT)
    # All go to offset 0, so all but the first are refused there; every one still ends here.
    events = until(peer.backend, lambda all: len(of_kind(all, EventKind.SENT)) == count)
    assert sorted(e.id for e in of_kind(events, EventKind.SENT)) == posts


def test_an_urgent_post_overtakes_one_that_already_waits_for_the_peer(peer: Peer, kind: Kind) -> None:
    """Only a bounded part of the long post is on its way, however long the peer takes nothing."""
    long, urgent = peer.open(96 << 20), peer.open(1 << 20)
    stop(peer.process)
    waiting = peer.post(long, 96 << 20, priority=5)
    time.sleep(0.2)
    assert peer.backend.counters()["bytes_sent"] < 32 << 20
    overtaking = peer.post(urgent, 1 << 20, priority=-5)
    peer.signal(signal.SIGCONT)
    events = until(peer.backend, lambda all: len(of_kind(all, EventKind.SENT)) == 2)
    ended = [e.id for e in of_kind(events, EventKind.SENT)]
    # Of several lanes the peer may read the one with the urgent bytes last.
    assert ended == [overtaking, waiting] or (kind.lanes > 1 and sorted(ended) == [waiting, overtaking])


def test_connecting_to_a_stopped_process_ends_in_time(kind: Kind) -> None:
    if kind.kernel_answers:
        pytest.skip("the kernel answers for a stopped listener")
    process, address = spawn(kind)
    stop(process)
    backend = kind.make()
    try:
        connection = backend.connect(address, 0.3)
        begun = time.monotonic()
        closed = until_event(backend, EventKind.CLOSED)
        assert (closed.connection, closed.status) == (connection, Status.IO_ERROR)
        assert time.monotonic() - begun < 2.0
    finally:
        end(process)
        backend.close()
