# SPDX-License-Identifier: Apache-2.0
"""What is refused, on which side, and what it says."""

from __future__ import annotations

import numpy as np
import pytest

from sage_kv_connector.backends.base import EventKind, Status
from tests.backends.kinds import Kind
from tests.backends.pair import Pair, of_kind, random_bytes, settle, table, until, until_event
from tests.backends.places import Places, address_of

PAGE = 4096


def _forged(kind: Kind, descriptor: bytes, **changes: int) -> bytes:
    """What a lying peer would post with."""
    if kind.forge is None:
        pytest.skip(f"what {kind.name}'s descriptors say is not known here")
    return kind.forge(descriptor, **changes)


def test_another_generation_fails_the_window(pair: Pair) -> None:
    source, target = random_bytes(PAGE), np.zeros(PAGE, np.uint8)
    window, descriptor = pair.window(target, generation=3)
    post = pair.post(descriptor, source, generation=4)
    failed = pair.ended(window)
    assert (failed.kind, failed.status) == (EventKind.WINDOW_FAILED, Status.STALE_GENERATION)
    assert pair.sent(post).status in (Status.OK, Status.STALE_GENERATION)
    assert not target.any()
    assert pair.receiver.counters()["stale_chunks"] == 1
    pair.transfers_still_work()


def test_bytes_that_would_land_twice_are_refused(pair: Pair) -> None:
    first, second, target = random_bytes(PAGE, 1), random_bytes(PAGE, 2), np.zeros(3 * PAGE, np.uint8)
    window, descriptor = pair.window(target, notify_chunks=True)
    pair.sent(pair.post(descriptor, first, at=100))
    until_event(pair.receiver, EventKind.LANDED, window)
    pair.sent(pair.post(descriptor, second, at=100 + PAGE - 1))
    failed = pair.ended(window)
    assert (failed.kind, failed.status) == (EventKind.WINDOW_FAILED, Status.OVERLAP)
    assert (failed.offset, failed.length) == (100 + PAGE - 1, PAGE)
    assert np.array_equal(target[100 : 100 + PAGE], first) and not target[100 + PAGE :].any()
    pair.transfers_still_work()


def test_a_post_beyond_the_window_is_refused_here_and_there(pair: Pair) -> None:
    source, target = random_bytes(PAGE), np.zeros(2 * PAGE, np.uint8)
    window, descriptor = pair.window(target[:PAGE])
    for at in (1, PAGE, 2**64 - 1):
        with pytest.raises(ValueError, match=f"offset {at}, length {PAGE} leaves the window of {PAGE} bytes"):
            pair.post(descriptor, source, at=at)
    lying = pair.post(_forged(pair.kind, descriptor, size=2**63), source, at=1)
    failed = pair.ended(window)
    assert (failed.kind, failed.status) == (EventKind.WINDOW_FAILED, Status.OUT_OF_BOUNDS)
    assert pair.sent(lying).status in (Status.OK, Status.OUT_OF_BOUNDS)
    assert not target.any()
    pair.transfers_still_work()


@pytest.mark.any_memory
def test_windows_of_others_and_unknown_windows_take_nothing(kind: Kind) -> None:
    receiver = kind.make()
    address = receiver.listen(kind.listen_on)
    pairs = []
    for _ in range(2):
        sender = kind.make()
        here = sender.connect(address, 5.0)
        until(sender, lambda all: bool(of_kind(all, EventKind.CONNECTED)))
        there = of_kind(
            until(receiver, lambda all: bool(of_kind(all, EventKind.ACCEPTED))), EventKind.ACCEPTED
        )
        kind.protect(sender, here, connects=True)
        kind.protect(receiver, there[0].connection, connects=False)
        sender.authorize(here)
        receiver.authorize(there[0].connection)
        pairs.append((sender, here, there[0].connection))
    source, target = random_bytes(PAGE), np.zeros(PAGE, np.uint8)
    places = Places(kind.memory)
    window = receiver.open_window(pairs[0][2], table([(places.register(receiver, target), PAGE)]), 1)
    descriptor = receiver.window_descriptor(window)
    intruder, to_receiver, _ = pairs[1]
    rows = table([(places.register(intruder, source), 0, PAGE)])
    for forged in (descriptor, _forged(kind, descriptor, window=10**6)):
        post = intruder.post(to_receiver, forged, rows, 1)
        until(intruder, lambda all, post=post: bool(of_kind(all, EventKind.SENT, post)))  # type: ignore[misc]
    assert settle(receiver) == [] and not places.seen(target).any()
    assert receiver.close_window(window) == 0
    for sender, _, _ in pairs:
        sender.close()
    receiver.close()
    places.free()


@pytest.mark.any_memory
def test_memory_that_is_not_registered_is_refused(pair: Pair) -> None:
    memory = np.zeros(4 * PAGE, np.uint8)
    start = pair.places.address(memory) + PAGE
    pair.places.register(pair.receiver, memory[PAGE : 2 * PAGE])
    pair.places.register(pair.sender, memory[PAGE : 2 * PAGE])
    outside = [
        (start - 1, PAGE),
        (start, PAGE + 1),
        (start + PAGE, 1),
        (start + 1, PAGE),
        (start, 2**64 - PAGE),
    ]
    for address, length in outside:
        with pytest.raises(ValueError, match=r"segment .* is not registered memory"):
            pair.receiver.open_window(pair.to_sender, table([(start, PAGE), (address, length)]), 1)
    window = pair.receiver.open_window(pair.to_sender, table([(start, PAGE)]), 1)
    descriptor = _forged(pair.kind, pair.receiver.window_descriptor(window), size=2**64 - 1)
    for address, length in outside:
        with pytest.raises(ValueError, match=r"descriptor .* is not registered memory"):
            pair.sender.post(pair.to_receiver, descriptor, table([(address, 0, length)]), 1)


def test_neighbouring_regions_serve_one_post(pair: Pair) -> None:
    """Descriptors are merged across a border of two regions, and each is checked by itself."""
    source, target = random_bytes(2 * PAGE), np.zeros(2 * PAGE, np.uint8)
    window, descriptor = pair.window(target)
    start = address_of(source)
    regions = [pair.sender.register_memory(start + i * PAGE, PAGE) for i in range(2)]
    rows = table([(start, 0, PAGE), (start + PAGE, PAGE, PAGE)])
    pair.sent(pair.sender.post(pair.to_receiver, descriptor, rows, 1))
    assert pair.ended(window).kind == EventKind.WINDOW_DONE
    assert np.array_equal(source, target)
    for region in regions:
        pair.sender.deregister_memory(region)


@pytest.mark.any_memory
def test_arguments_are_checked_by_name(pair: Pair) -> None:
    memory = np.zeros(PAGE, np.uint8)
    window, descriptor = pair.window(memory)
    address = pair.places.register(pair.sender, memory)
    good = table([(address, 0, PAGE)])
    for start, length in ((0, 1), (1, 0), (2**64 - 1, 2)):
        with pytest.raises(ValueError, match="memory region"):
            pair.sender.register_memory(start, length)
    with pytest.raises(ValueError, match="memory region 999 is unknown"):
        pair.sender.deregister_memory(999)
    with pytest.raises(ValueError, match="descriptors has shape"):
        pair.sender.post(pair.to_receiver, descriptor, good[:, :2], 1)
    with pytest.raises(ValueError, match="segments has shape"):
        pair.receiver.open_window(pair.to_sender, good, 1)
    with pytest.raises(ValueError, match="dtype int64"):
        pair.sender.post(pair.to_receiver, descriptor, good.astype(np.int64), 1)
    with pytest.raises(ValueError, match="hold no bytes"):
        pair.sender.post(pair.to_receiver, descriptor, good[:0], 1)
    with pytest.raises(ValueError, match="at least one segment"):
        pair.receiver.open_window(pair.to_sender, good[:0, :2], 1)
    with pytest.raises(ValueError, match="segment 0 has length 0"):
        pair.receiver.open_window(pair.to_sender, table([(address, 0)]), 1)
    with pytest.raises(ValueError, match="window_descriptor has 3 bytes"):
        pair.sender.post(pair.to_receiver, b"abc", good, 1)
    with pytest.raises(ValueError, match="generation must not be 0"):
        pair.sender.post(pair.to_receiver, descriptor, good, 0)
    with pytest.raises(ValueError, match="generation must not be 0"):
        pair.receiver.open_window(pair.to_sender, good[:, ::2].copy(), 0)
    with pytest.raises(ValueError, match="window 12345 is unknown"):
        pair.receiver.window_descriptor(12345)
    with pytest.raises(ConnectionError, match="connection 12345 is closed"):
        pair.sender.post(12345, descriptor, good, 1)
    with pytest.raises(ConnectionError, match="connection 12345 is closed"):
        pair.receiver.open_window(12345, good[:, :2].copy(), 1)
    with pytest.raises(ValueError, match="must start with"):
        pair.sender.connect("other://x", 1.0)
    for timeout_s in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="timeout_s"):
            pair.sender.connect(pair.address, timeout_s)
    assert pair.receiver.close_window(window) == 0


def test_options_out_of_range_are_refused(kind: Kind) -> None:
    for option, value in kind.bounds:
        with pytest.raises(ValueError, match=f"{option} is {value}"):
            kind.make(**{option: value})


def test_a_failed_window_does_not_disturb_another(pair: Pair) -> None:
    source = random_bytes(20 << 20)
    bad_target, good_target = np.zeros(20 << 20, np.uint8), np.zeros(20 << 20, np.uint8)
    bad, bad_descriptor = pair.window(bad_target)
    good, good_descriptor = pair.window(good_target)
    pair.post(bad_descriptor, source, generation=9)
    pair.post(good_descriptor, source)
    ends = {EventKind.WINDOW_DONE, EventKind.WINDOW_FAILED}
    events = until(pair.receiver, lambda all: len([e for e in all if e.kind in ends]) == 2)
    assert {(e.id, e.kind) for e in events if e.kind in ends} == {
        (bad, EventKind.WINDOW_FAILED),
        (good, EventKind.WINDOW_DONE),
    }
    assert np.array_equal(source, good_target) and not bad_target.any()
