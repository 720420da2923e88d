# SPDX-License-Identifier: Apache-2.0
"""Control messages: whole, in order, bounded."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from sage_kv_connector.backends.base import EventKind, Status
from tests.backends.pair import Pair, of_kind, random_bytes, settle, until

UNAUTHORIZED, AUTHORIZED = 64 << 10, 1 << 20


def test_messages_of_all_sizes_arrive_whole_and_in_order(pair: Pair) -> None:
    longest = pair.kind.longest_message(AUTHORIZED)
    sizes = [
        0,
        1,
        7,
        8,
        9,
        63,
        64,
        65,
        4095,
        4096,
        UNAUTHORIZED,
        UNAUTHORIZED + 1,
        longest - 1,
        longest,
    ]
    messages = [random_bytes(size, i).tobytes() for i, size in enumerate(sizes * 3)]
    got: list[bytes] = []
    for message in messages:
        while True:
            try:
                pair.sender.send(pair.to_receiver, message)
                break
            except BlockingIOError:
                got += [e.payload for e in settle(pair.receiver, 0.01)]
    events = until(pair.receiver, lambda all: len(got) + len(all) == len(messages))
    assert [*got, *(e.payload for e in events)] == messages


def test_bounds_before_and_after_authorize(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(authorize=False)
    short, long = map(pair.kind.longest_message, (UNAUTHORIZED, AUTHORIZED))
    pair.sender.send(pair.to_receiver, bytes(short))
    pair.receiver.send(pair.to_sender, bytes(short))
    for backend, connection in ((pair.sender, pair.to_receiver), (pair.receiver, pair.to_sender)):
        with pytest.raises(ValueError, match=f"message has {UNAUTHORIZED + 1} bytes, at most {UNAUTHORIZED}"):
            backend.send(connection, bytes(short + 1))
        until(backend, lambda all: bool(of_kind(all, EventKind.MESSAGE)))
    pair.authorize()
    for backend, connection in ((pair.sender, pair.to_receiver), (pair.receiver, pair.to_sender)):
        backend.send(connection, bytes(long))
        with pytest.raises(ValueError, match=f"message has {AUTHORIZED + 1} bytes, at most {AUTHORIZED}"):
            backend.send(connection, bytes(long + 1))
    for backend in (pair.sender, pair.receiver):
        message = of_kind(
            until(backend, lambda all: bool(of_kind(all, EventKind.MESSAGE))), EventKind.MESSAGE
        )[0]
        assert len(message.payload) == long


def test_a_long_message_of_a_peer_without_authorization_ends_the_connection(
    make_pair: Callable[..., Pair],
) -> None:
    pair = make_pair(authorize=False)
    pair.sender.authorize(pair.to_receiver)  # it may send longer ones now, but is not trusted there
    pair.sender.send(pair.to_receiver, bytes(UNAUTHORIZED + 1))
    events = until(pair.receiver, lambda all: bool(of_kind(all, EventKind.CLOSED)))
    assert [(e.kind, e.status) for e in events] == [(EventKind.CLOSED, Status.PROTOCOL_ERROR)]


def test_data_of_a_peer_without_authorization_ends_the_connection(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(authorize=False)
    target = np.zeros(4096, np.uint8)
    _, descriptor = pair.window(target)
    pair.sender.authorize(pair.to_receiver)
    pair.post(descriptor, random_bytes(4096))
    events = until(pair.receiver, lambda all: bool(of_kind(all, EventKind.CLOSED)))
    assert [(e.kind, e.status) for e in events] == [
        (EventKind.WINDOW_FAILED, Status.CONNECTION_LOST),
        (EventKind.CLOSED, Status.PROTOCOL_ERROR),
    ]
    assert not target.any()


def test_posts_wait_for_authorize(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(authorize=False)
    source, target = random_bytes(1 << 20), np.zeros(1 << 20, np.uint8)
    window, descriptor = pair.window(target)
    post = pair.post(descriptor, source)
    assert settle(pair.sender) == [] and settle(pair.receiver) == []
    pair.receiver.authorize(pair.to_sender)
    pair.authorize()
    assert pair.ended(window).kind == EventKind.WINDOW_DONE and pair.sent(post).status == Status.OK


def test_a_peer_that_takes_nothing_fills_a_bounded_queue_and_loses_nothing(pair: Pair) -> None:
    """Neither side keeps more than it may; all that was accepted arrives once it is taken."""
    message, accepted = pair.kind.longest_message(AUTHORIZED), 0
    for _ in range(3):  # the kernel's buffers may take more after a while
        with pytest.raises(BlockingIOError):
            while accepted < 400:
                pair.sender.send(pair.to_receiver, accepted.to_bytes(4, "little") + bytes(message - 4))
                accepted += 1
        assert 8 <= accepted < 100
        settle(pair.sender, 0.3)
    events = until(pair.receiver, lambda all: len(of_kind(all, EventKind.MESSAGE)) == accepted)
    assert [int.from_bytes(e.payload[:4], "little") for e in events] == list(range(accepted))
    assert settle(pair.receiver) == []
    pair.transfers_still_work()


def test_a_message_is_sent_before_data_that_still_waits(pair: Pair) -> None:
    size = 96 << 20
    target = np.zeros(size, np.uint8)
    _, descriptor = pair.window(target)
    pair.post(descriptor, random_bytes(size))
    pair.sender.send(pair.to_receiver, b"overtakes")
    kinds = [e.kind for e in until(pair.receiver, lambda all: bool(of_kind(all, EventKind.WINDOW_DONE)))]
    assert kinds == [EventKind.MESSAGE, EventKind.WINDOW_DONE]


def test_messages_to_a_closed_connection_vanish(pair: Pair) -> None:
    pair.sender.close_connection(pair.to_receiver)
    pair.sender.send(pair.to_receiver, b"too late")
    assert of_kind(until(pair.sender, lambda all: bool(of_kind(all, EventKind.CLOSED))), EventKind.CLOSED)
    closed = until(pair.receiver, lambda all: bool(of_kind(all, EventKind.CLOSED)))
    assert [e.kind for e in closed] == [EventKind.CLOSED]
