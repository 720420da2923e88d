# SPDX-License-Identifier: Apache-2.0
"""How posts, windows and connections end, when something ends them early."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from sage_kv_connector.backends.base import EventKind, Status
from tests.backends.kinds import Kind
from tests.backends.pair import Pair, of_kind, random_bytes, settle, table, until, until_event
from tests.backends.places import address_of

BIG = 48 << 20


@pytest.mark.any_memory
def test_a_cancelled_post_ends_once_and_its_memory_is_free(pair: Pair) -> None:
    """What had landed is right, and nothing written into the source afterwards ever counts."""
    for delay_s in (0.0, 0.0005, 0.002, 0.005):
        source, target = np.ones(BIG, np.uint8), np.zeros(BIG, np.uint8)
        window, descriptor = pair.window(target, notify_chunks=True)
        post = pair.post(descriptor, source)
        time.sleep(delay_s)
        pair.sender.cancel(post)
        sent = pair.sent(post)
        source[:] = 2
        pair.places.changed(source)
        assert sent.status in (Status.CANCELLED, Status.OK)
        assert sent.length == (BIG if sent.status == Status.OK else 0)
        assert not of_kind(settle(pair.sender), EventKind.SENT)
        events = settle(pair.receiver)
        pair.places.seen(target)
        for event in of_kind(events, EventKind.LANDED, window):
            assert (target[event.offset : event.offset + event.length] == 1).all()
        if of_kind(events, EventKind.WINDOW_DONE, window):
            assert (target == 1).all()
        else:
            assert {e.status for e in of_kind(events, EventKind.WINDOW_FAILED)} <= {Status.STALE_GENERATION}
        pair.receiver.close_window(window)
    pair.transfers_still_work()


@pytest.mark.any_memory
def test_a_waiting_post_is_cancelled_before_it_leaves(pair: Pair) -> None:
    source, target = random_bytes(BIG), np.zeros(BIG, np.uint8)
    late = np.full(4096, 7, np.uint8)
    late_target = np.zeros(4096, np.uint8)
    window, descriptor = pair.window(target)
    late_window, late_descriptor = pair.window(late_target)
    posts = [pair.post(descriptor, source, priority=0), pair.post(late_descriptor, late, priority=1)]
    pair.sender.cancel(posts[1])
    events = until(pair.sender, lambda all: len(of_kind(all, EventKind.SENT)) == 2)
    status = {e.id: e.status for e in of_kind(events, EventKind.SENT)}
    assert status[posts[0]] == Status.OK
    assert pair.ended(window).kind == EventKind.WINDOW_DONE
    if status[posts[1]] == Status.CANCELLED:
        assert not of_kind(settle(pair.receiver), EventKind.WINDOW_DONE, late_window)


@pytest.mark.any_memory
def test_cancel_of_what_is_over_or_unknown_is_nothing(pair: Pair) -> None:
    source, target = random_bytes(4096), np.zeros(4096, np.uint8)
    _, descriptor = pair.window(target)
    post = pair.post(descriptor, source)
    assert pair.sent(post).status == Status.OK
    pair.sender.cancel(post)
    pair.sender.cancel(10**9)
    assert settle(pair.sender) == []


@pytest.mark.any_memory
def test_nothing_is_written_after_close_window(pair: Pair) -> None:
    for delay_s in (0.0, 0.0005, 0.002, 0.005):
        source, target = np.ones(BIG, np.uint8), np.zeros(BIG, np.uint8)
        window, descriptor = pair.window(target)
        post = pair.post(descriptor, source)
        time.sleep(delay_s)
        landed = pair.receiver.close_window(window)
        before = pair.places.seen(target).copy()
        assert landed <= int(before.sum())
        pair.sent(post)
        settle(pair.receiver, 0.05)
        assert np.array_equal(before, pair.places.seen(target))
        assert pair.receiver.close_window(window) == 0
    pair.transfers_still_work()


def test_lower_priority_numbers_go_first(make_pair: Callable[..., Pair]) -> None:
    """An urgent post overtakes a long one that was posted earlier."""
    pair = make_pair(authorize=False)
    size = 96 << 20
    source, target = random_bytes(size), np.zeros(size, np.uint8)
    urgent, urgent_target = random_bytes(1 << 20, 1), np.zeros(1 << 20, np.uint8)
    window, descriptor = pair.window(target)
    urgent_window, urgent_descriptor = pair.window(urgent_target)
    pair.sender.register_memory(address_of(urgent), urgent.nbytes)
    pair.post(descriptor, source, priority=5)
    pair.post(urgent_descriptor, urgent, priority=-1)
    pair.authorize()  # nothing leaves before
    ends = until(pair.receiver, lambda all: len(of_kind(all, EventKind.WINDOW_DONE)) == 2)
    ended = [e.id for e in of_kind(ends, EventKind.WINDOW_DONE)]
    # Of several lanes the one with the urgent bytes may be read last.
    assert ended == [urgent_window, window] or (pair.kind.lanes > 1 and set(ended) == {urgent_window, window})
    assert np.array_equal(source, target) and np.array_equal(urgent, urgent_target)


@pytest.mark.any_memory
def test_equal_priorities_keep_the_order_of_posting(pair: Pair) -> None:
    if pair.kind.lanes > 1:
        pytest.skip("with several lanes the last chunks of two posts may change places")
    windows = []
    targets = [np.zeros(3 << 20, np.uint8) for _ in range(6)]
    for i, target in enumerate(targets):
        window, descriptor = pair.window(target)
        windows.append(window)
        pair.post(descriptor, random_bytes(3 << 20, i))
    ends = until(pair.receiver, lambda all: len(of_kind(all, EventKind.WINDOW_DONE)) == 6)
    assert [e.id for e in of_kind(ends, EventKind.WINDOW_DONE)] == windows


@pytest.mark.any_memory
@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_closing_a_connection_mid_transfer_ends_everything_in_order(pair: Pair, side: str) -> None:
    source, target = random_bytes(BIG), np.zeros(BIG, np.uint8)
    for whole in (source, target):  # before parts of it are used
        pair.places.address(whole)
    windows = [pair.window(target[i::1][: BIG // 2] if i == 0 else target[BIG // 2 :])[0] for i in range(2)]
    posts = [
        pair.post(pair.receiver.window_descriptor(w), source[i * BIG // 2 : (i + 1) * BIG // 2])
        for i, w in enumerate(windows)
    ]
    descriptor = pair.receiver.window_descriptor(windows[0])
    time.sleep(0.001)
    if side == "sender":
        pair.sender.close_connection(pair.to_receiver)
    else:
        pair.receiver.close_connection(pair.to_sender)
    quiet = side == "receiver" and pair.kind.quiet_when_closing
    after = pair.places.seen(target).copy() if quiet else None
    here = until(pair.sender, lambda all: bool(of_kind(all, EventKind.CLOSED)))
    there = until(pair.receiver, lambda all: bool(of_kind(all, EventKind.CLOSED)))
    if after is None:
        after = pair.places.seen(target).copy()
    assert sorted(e.id for e in of_kind(here, EventKind.SENT)) == posts
    assert {e.status for e in of_kind(here, EventKind.SENT)} <= {
        Status.OK,
        Status.CONNECTION_LOST,
        Status.REFUSED,
    }
    assert (
        sorted(e.id for e in there if e.kind in (EventKind.WINDOW_DONE, EventKind.WINDOW_FAILED)) == windows
    )
    # A sender that closes revokes what is being read at that moment.
    failures = {e.status for e in of_kind(there, EventKind.WINDOW_FAILED)}
    assert failures <= {Status.CONNECTION_LOST, Status.STALE_GENERATION}
    closer = here if side == "sender" else there
    assert closer[-1].status == Status.CANCELLED
    for events in (here, there):
        assert events[-1].kind == EventKind.CLOSED and len(of_kind(events, EventKind.CLOSED)) == 1
    assert settle(pair.sender) == settle(pair.receiver) == []
    assert np.array_equal(after, pair.places.seen(target))
    with pytest.raises(ConnectionError, match="closed"):
        rows = table([(pair.places.address(source), 0, 1)])
        pair.sender.post(pair.to_receiver, descriptor, rows, 1)


@pytest.mark.any_memory
@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_closing_a_backend_with_everything_in_flight(make_pair: Callable[..., Pair], side: str) -> None:
    for delay_s in (0.0, 0.001, 0.004):
        pair = make_pair()
        source, target = random_bytes(BIG), np.zeros(BIG, np.uint8)
        window, descriptor = pair.window(target)
        post = pair.post(descriptor, source)
        for i in range(50):
            pair.sender.send(pair.to_receiver, bytes([i]) * 10_000)
        time.sleep(delay_s)
        closed, other = (pair.sender, pair.receiver) if side == "sender" else (pair.receiver, pair.sender)
        closed.close()
        closed.close()
        mine = closed.poll(1000)
        theirs = until(other, lambda all: bool(of_kind(all, EventKind.CLOSED)))
        for events in (mine, theirs):
            assert events[-1].kind == EventKind.CLOSED and len(of_kind(events, EventKind.CLOSED)) == 1
        here, there = (mine, theirs) if side == "sender" else (theirs, mine)
        assert [e.id for e in of_kind(here, EventKind.SENT)] == [post]
        ends = [e.id for e in there if e.kind in (EventKind.WINDOW_DONE, EventKind.WINDOW_FAILED)]
        assert ends == [window]


def test_a_closed_backend_says_so(kind: Kind) -> None:
    backend = kind.make()
    address = backend.listen(kind.listen_on)
    backend.close()
    assert backend.poll() == [] and not backend.wait(0.01) and backend.fileno() == -1
    with pytest.raises(ValueError, match="closed"):
        backend.listen(kind.listen_on)
    with pytest.raises(ValueError, match="closed"):
        backend.connect(address, 1.0)


def test_close_ends_a_wait_in_another_thread(kind: Kind) -> None:
    backend = kind.make()
    answers: list[bool] = []
    waiter = threading.Thread(target=lambda: answers.append(backend.wait(60.0)))
    waiter.start()
    time.sleep(0.05)
    backend.close()
    waiter.join(5.0)
    assert answers == [False]


def test_memory_in_use_can_not_be_deregistered(pair: Pair) -> None:
    source, target = random_bytes(BIG), np.zeros(BIG, np.uint8)
    there = pair.receiver.register_memory(address_of(target), BIG)
    here = pair.sender.register_memory(address_of(source), BIG)
    window = pair.receiver.open_window(pair.to_sender, table([(address_of(target), BIG)]), 1)
    with pytest.raises(ValueError, match="used by 1"):
        pair.receiver.deregister_memory(there)
    post = pair.sender.post(
        pair.to_receiver, pair.receiver.window_descriptor(window), table([(address_of(source), 0, BIG)]), 1
    )
    with pytest.raises(ValueError, match="used by 1"):
        pair.sender.deregister_memory(here)
    pair.sent(post)
    pair.sender.deregister_memory(here)
    until_event(pair.receiver, EventKind.WINDOW_DONE, window)
    pair.receiver.close_window(window)
    pair.receiver.deregister_memory(there)
    with pytest.raises(ValueError, match="unknown"):
        pair.receiver.deregister_memory(there)
