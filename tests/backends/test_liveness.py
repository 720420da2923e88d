# SPDX-License-Identifier: Apache-2.0
"""A watched peer: it lives as long as its lanes do, and is given up when they are silent."""

from __future__ import annotations

import json
import math
import select
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from sage_kv_connector.backends.base import Backend, EventKind, Status
from tests.backends.kinds import Kind
from tests.backends.pair import PATIENCE_S, Pair, of_kind, settle, until, until_event
from tests.backends.peer import Peer, stop

TIMEOUT_S = 0.3
#: A watched peer that is silent is gone by then.
NOTICED_S = 2 * TIMEOUT_S


@pytest.fixture
def peer(kind: Kind) -> Iterator[Peer]:
    made = Peer(kind)
    made.order(busy=0)  # answered by a peer that authorized us
    until_event(made.backend, EventKind.MESSAGE)
    yield made
    made.close()


def test_a_stopped_peer_is_given_up(peer: Peer) -> None:
    window, _, _ = peer.window(1 << 20)
    peer.backend.watch(peer.connection, TIMEOUT_S)
    assert settle(peer.backend, NOTICED_S) == []
    stop(peer.process)
    events = peer.until_closed(PATIENCE_S)
    assert [(e.kind, e.status) for e in events] == [
        (EventKind.WINDOW_FAILED, Status.CONNECTION_LOST),
        (EventKind.CLOSED, Status.SILENT),
    ]
    assert [e.id for e in of_kind(events, EventKind.WINDOW_FAILED)] == [window]
    assert {e.detail for e in events} == {"the peer is silent for 0.3 s"}
    assert settle(peer.backend) == []


def test_a_peer_whose_interpreter_is_busy_lives(peer: Peer) -> None:
    peer.backend.watch(peer.connection, TIMEOUT_S)
    peer.order(busy=3 * NOTICED_S)
    answer = until_event(peer.backend, EventKind.MESSAGE)
    assert json.loads(answer.payload) == {"busy": 3 * NOTICED_S}
    assert settle(peer.backend, NOTICED_S) == []


def test_a_peer_that_is_not_watched_any_more_may_be_silent(peer: Peer) -> None:
    peer.backend.watch(peer.connection, TIMEOUT_S)
    stop(peer.process)
    peer.backend.unwatch(peer.connection)
    assert settle(peer.backend, 2 * NOTICED_S) == []
    peer.signal(signal.SIGCONT)
    peer.order(busy=0)
    until_event(peer.backend, EventKind.MESSAGE)


def test_two_that_watch_each_other_stay_and_move_bytes(pair: Pair) -> None:
    for backend, connection in ((pair.sender, pair.to_receiver), (pair.receiver, pair.to_sender)):
        backend.watch(connection, TIMEOUT_S)
        backend.watch(connection, 2 * TIMEOUT_S)  # the last word counts
    for _ in range(3):
        assert settle(pair.sender, NOTICED_S) == settle(pair.receiver, 0.01) == []
        pair.transfers_still_work()


def test_lanes_that_sleep_wake_up_to_watch(peer: Peer) -> None:
    """Nobody calls the backend, as a control thread that is busy elsewhere."""
    time.sleep(0.1)
    stop(peer.process)
    peer.backend.watch(peer.connection, TIMEOUT_S)
    readable = select.poll()
    readable.register(peer.backend.fileno(), select.POLLIN)
    assert readable.poll(PATIENCE_S * 1000)
    assert [e.status for e in of_kind(settle(peer.backend), EventKind.CLOSED)] == [Status.SILENT]


def test_a_peer_is_watched_by_lanes_that_a_waiter_drives(peer: Peer) -> None:
    """A thread that waits for events keeps channels to itself for a while."""
    peer.backend.watch(peer.connection, TIMEOUT_S)
    closed = threading.Event()
    waiter = threading.Thread(target=_wait_until, args=(peer.backend, closed))
    waiter.start()
    try:
        time.sleep(2 * NOTICED_S)
        assert not closed.is_set()
        stop(peer.process)
        assert closed.wait(PATIENCE_S)
    finally:
        peer.backend.close()
        waiter.join()


def _wait_until(backend: Backend, closed: threading.Event) -> None:
    while backend.fileno() >= 0:
        if backend.wait(0.001) and of_kind(backend.poll(), EventKind.CLOSED):
            closed.set()
            return


def test_a_full_inbox_here_is_no_silence_of_the_peer(pair: Pair) -> None:
    """Where the layer above takes no messages, lanes read none, and so may not see an answer."""
    message = bytes(pair.kind.longest_message(1 << 20))
    for _ in range(17):  # more than the receiver's inbox takes
        pair.sender.send(pair.to_receiver, message)
        time.sleep(0.005)
    pair.receiver.watch(pair.to_sender, TIMEOUT_S)
    time.sleep(2 * NOTICED_S)
    ended = {EventKind.MESSAGE: 17, EventKind.CLOSED: 1}
    events = until(
        pair.receiver, lambda came: any(len(of_kind(came, kind)) == n for kind, n in ended.items())
    )
    assert not of_kind(events, EventKind.CLOSED)
    pair.receiver.unwatch(pair.to_sender)
    pair.transfers_still_work()


def test_times_and_connections_that_can_not_be_watched(pair: Pair) -> None:
    for timeout_s in (0.0, -1.0, math.nan, math.inf, 604_801.0):
        with pytest.raises(ValueError, match="timeout_s"):
            pair.sender.watch(pair.to_receiver, timeout_s)
    pair.sender.watch(10**9, 1.0)
    pair.sender.unwatch(10**9)
    pair.sender.unwatch(pair.to_receiver)
    pair.sender.watch(pair.to_receiver, 604_800.0)
    pair.transfers_still_work()
