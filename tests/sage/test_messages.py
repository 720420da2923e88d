# SPDX-License-Identifier: Apache-2.0
"""Messages between ranks, without any SAGE package: bytes, sizes, retries, dead peers, wrong calls."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.integrations.sage.payload import Tagged, to_receive, to_send
from sage_kv_connector.integrations.sage.point_to_point import MessageError, PointToPoint
from tests.engine.paged_side import eventually

Pair = tuple[PointToPoint, PointToPoint]


@pytest.fixture(scope="module", params=["shm", "tcp"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    ends = make_pair(backend=request.param, deadline_s=20)
    yield ends
    for end in ends:
        end.close()


def make_pair(**options: Any) -> Pair:
    config = KVTransportConfig.load(options)
    ends = PointToPoint(config, 0), PointToPoint(config, 1)
    for end in ends:
        end.join({0: ends[0].spec, 1: ends[1].spec})
    return ends


def later(call: Callable[..., Any], *arguments: Any, **named: Any) -> Future[Any]:
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(call(*arguments, **named))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=70_000), known=st.booleans())
def test_bytes_arrive_as_they_were(pair: Pair, content: bytes, known: bool) -> None:
    target = bytearray(len(content)) if known else bytearray()
    sent = later(pair[0].send, content, 1)
    assert pair[1].recv(target, 0) == len(content)
    assert sent.result(10) == len(content) and target == content


def test_strided_arrays_go_and_come(pair: Pair) -> None:
    source = np.arange(4096, dtype=np.int32).reshape(64, 64).T
    target = np.zeros((128, 64), dtype=np.int32)[::2]
    sent = later(pair[1].send, source, 0)
    pair[0].recv(target, 1)
    sent.result(10)
    assert np.array_equal(target, source)


def test_another_size_fails_on_both_sides_and_can_be_tried_again(pair: Pair) -> None:
    sent = later(pair[0].send, b"12345", 1)
    with pytest.raises(MessageError, match="nbytes: 5 offered, 4 asked for"):
        pair[1].recv(bytearray(4), 0)
    with pytest.raises(MessageError, match=r"the receiver failed.*nbytes: 5 offered"):
        sent.result(10)
    sent = later(pair[0].send, b"54321", 1)
    target = bytearray(5)
    pair[1].recv(target, 0)
    sent.result(10)
    assert target == b"54321"


def test_a_receiver_that_came_too_early_may_come_again(pair: Pair) -> None:
    begun = time.monotonic()
    with pytest.raises(MessageError, match="recv of message"):
        pair[1].recv(bytearray(3), 0, deadline_s=0.2)
    assert time.monotonic() - begun < 3
    sent = later(pair[0].send, b"abc", 1)
    target = bytearray(3)
    pair[1].recv(target, 0)
    assert sent.result(10) == 3 and target == b"abc"


def test_tags_pair_what_threads_send_in_any_order(pair: Pair) -> None:
    contents = {f"handle-{index}": bytes([index]) * 5000 for index in range(8)}
    sent = [later(pair[0].send, Tagged(content, tag), 1) for tag, content in contents.items()]
    targets = {tag: bytearray(5000) for tag in contents}
    received = [later(pair[1].recv, Tagged(targets[tag], tag), 0) for tag in reversed(list(contents))]
    for one in (*sent, *received):
        one.result(15)
    assert targets == contents
    again = later(pair[0].send, Tagged(b"xy", "handle-0"), 1)
    pair[1].recv(Tagged(second := bytearray(2), "handle-0"), 0)
    assert again.result(10) == 2 and second == b"xy"


def test_nothing_is_left_behind(pair: Pair) -> None:
    for _ in range(20):
        sent = later(pair[0].send, b"x" * 1000, 1)
        pair[1].recv(bytearray(1000), 0)
        sent.result(10)
    # The verdict on each direction's last message is kept, and nothing else.
    eventually(
        lambda: all(one.counters()["subscriptions"] == 0 and one.counters()["offers"] <= 1 for one in pair)
    )


@pytest.mark.parametrize("backend", ["shm", "tcp"])
def test_a_peer_that_goes_ends_both_calls(backend: str) -> None:
    first, second = make_pair(backend=backend, deadline_s=20)
    sent = later(first.send, b"x" * 100, 1)
    second.recv(bytearray(100), 0)  # a session is there
    sent.result(10)
    waiting = later(first.recv, bytearray(10), 1)
    sending = later(first.send, b"y" * 10, 1)
    time.sleep(0.3)
    begun = time.monotonic()
    second.close()
    for one in (waiting, sending):
        with pytest.raises(MessageError, match="rank 0"):
            one.result(10)
    assert time.monotonic() - begun < 8
    first.close()


@pytest.mark.parametrize("backend", ["shm", "tcp"])
@pytest.mark.parametrize("tag", ["", "handle"])
def test_a_receiver_may_go_as_soon_as_it_has_everything(backend: str, tag: str) -> None:
    """The sender must still learn that its last message arrived."""
    for _ in range(10):
        first, second = make_pair(backend=backend, deadline_s=20)
        for number in range(2):
            sent = later(first.send, Tagged(b"x" * 100_000, tag), 1)
            second.recv(Tagged(bytearray(100_000), tag), 0)
            if number == 0:
                sent.result(10)
        second.close()
        assert sent.result(10) == 100_000
        first.close()


@pytest.mark.parametrize("backend", ["shm", "tcp"])
def test_a_receiver_does_not_wait_for_a_sender_that_is_gone(backend: str) -> None:
    first, second = make_pair(backend=backend, deadline_s=20)
    sent = later(first.send, b"abc", 1)
    second.recv(bytearray(3), 0)
    sent.result(10)
    first.close()
    begun = time.monotonic()
    second.close()
    assert time.monotonic() - begun < 2


def test_wrong_calls_are_named(pair: Pair) -> None:
    with pytest.raises(ValueError, match=r"rank 7 is no peer of rank 0; allowed: \[1\]"):
        pair[0].send(b"", 7)
    with pytest.raises(ValueError, match="rank 0 is no peer of rank 0"):
        pair[0].recv(bytearray(1), 0)
    with pytest.raises(ValueError, match="tag has 129 characters; allowed: up to 128"):
        pair[0].send(Tagged(b"", "x" * 129), 1)
    with pytest.raises(ValueError, match="payload is a str"):
        to_send("text")
    with pytest.raises(ValueError, match="read-only; allowed: bytearray"):
        to_receive(b"abc")


def test_a_peer_out_of_reach_is_named() -> None:
    first = PointToPoint(KVTransportConfig(backend="tcp"), 0)
    second = PointToPoint(KVTransportConfig(backend="shm"), 1)
    with pytest.raises(ValueError, match=r"rank 1 listens on shm://.*backend tcp"):
        first.join({0: first.spec, 1: second.spec})
    first.close()
    second.close()


@pytest.mark.parametrize("backend", ["shm", "tcp"])
def test_a_tag_that_is_used_again_at_once_is_another_message(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its verdict is not the one on the message before, which may still be on offer."""
    first, second = make_pair(backend=backend, deadline_s=20)
    names: list[str] = []
    offer = second._core.offer

    def noted(name: str, *rest: Any) -> None:
        names.append(name)
        offer(name, *rest)

    monkeypatch.setattr(second._core, "offer", noted)
    for number in range(20):
        sent = later(first.send, Tagged(bytes([number]) * 100, "handle"), 1)
        got = bytearray(100)
        second.recv(Tagged(got, "handle"), 0)
        assert sent.result(10) == 100 and got == bytes([number]) * 100
    assert len(names) == len(set(names)) == 20
    for side in (first, second):
        side.close()
