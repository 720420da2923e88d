# SPDX-License-Identifier: Apache-2.0
"""A library that fails, refuses or hangs costs no byte; it is asked again, later each time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from sage_kv_connector.backends.base import Backend, EventKind, Status
from sage_kv_connector.backends.carried import backend as carried_backend
from sage_kv_connector.backends.carried import reader
from sage_kv_connector.backends.carried.library import LibraryError, LibrarySettings
from sage_kv_connector.backends.mooncake.library import MooncakeLibrary
from tests.backends.carried.kinds import KINDS
from tests.backends.carried.this_machine import ThisMachine, ThisMachineBackend
from tests.backends.pair import PATIENCE_S, Pair, random_bytes

SIZE = 3_000_001


@pytest.fixture
def made() -> Iterator[Callable[..., Pair]]:
    pairs: list[Pair] = []

    def make(**options: Any) -> Pair:
        pairs.append(Pair(KINDS[0], chunk_bytes=64 << 10, **options))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.close()


def library(backend: Backend) -> ThisMachine:
    assert isinstance(backend, ThisMachineBackend)
    return backend.library


def transfer(pair: Pair, generation: int) -> None:
    source, target = random_bytes(SIZE, generation), np.zeros(SIZE, np.uint8)
    window, descriptor = pair.window(target, generation)
    post = pair.post(descriptor, source, generation)
    assert pair.ended(window).kind == EventKind.WINDOW_DONE
    assert pair.sent(post).status == Status.OK
    assert np.array_equal(source, target)
    pair.receiver.close_window(window)


def until_true(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def mode(pair: Pair) -> str:
    return pair.sender.connection_info(pair.to_receiver).mode


def test_a_library_that_fails_is_asked_again(
    made: Callable[..., Pair], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "FIRST_RETRY_S", 2.0)  # longer than a transfer takes on a busy machine
    pair = made()
    transfer(pair, 1)
    reading = library(pair.receiver)
    before = reading.reads
    assert before > SIZE // (64 << 10)
    reading.fails = True
    with caplog.at_level(logging.WARNING, logger=reader.__name__):
        transfer(pair, 2)
    assert [r.getMessage() for r in caplog.records] == [
        "reading from a peer failed: it failed; its chunks go over sockets for now"
    ]
    assert pair.receiver.counters()["reads_failed"] > 0
    until_true(lambda: mode(pair) == "stream")
    assert "it failed" in pair.sender.connection_info(pair.to_receiver).reason
    reading.fails = False
    until_true(lambda: mode(pair) == "this-machine")
    before = reading.reads
    transfer(pair, 3)
    assert reading.reads > before


def test_a_library_that_fails_again_and_again_is_asked_less_and_less(
    made: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "FIRST_RETRY_S", 0.02)
    monkeypatch.setattr(reader, "LONGEST_RETRY_S", 0.3)
    pair = made()
    reading = library(pair.receiver)
    reading.fails = True
    begun = time.monotonic()
    generation = 0
    while time.monotonic() - begun < 1.5:
        generation += 1
        transfer(pair, generation)
    # 0.02, 0.04, 0.08, 0.16, then 0.3 each: so many times some chunks were under way at most.
    assert reading.reads < 12 * 64
    assert generation > 12


def test_a_peer_that_can_not_be_met_is_sent_to_by_sockets(
    made: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "FIRST_RETRY_S", 0.05)
    pair = made(authorize=False)
    reading = library(pair.receiver)
    reading.refuses = True
    pair.sender.authorize(pair.to_receiver)
    pair.receiver.authorize(pair.to_sender)
    until_true(lambda: "does not want to" in pair.sender.connection_info(pair.to_receiver).reason)
    transfer(pair, 1)
    assert reading.reads == 0
    reading.refuses = False
    until_true(lambda: mode(pair) == "this-machine")
    transfer(pair, 2)
    assert reading.reads > 0


def test_memory_that_the_library_does_not_take_goes_by_sockets(
    made: Callable[..., Pair], caplog: pytest.LogCaptureFixture
) -> None:
    pair = made()
    library(pair.sender).most_bytes = 1000
    with caplog.at_level(logging.WARNING, logger=carried_backend.__name__):
        transfer(pair, 1)
        transfer(pair, 2)
    assert len(caplog.records) == 1 and "does not take memory" in caplog.text
    assert library(pair.receiver).reads == 0
    library(pair.sender).most_bytes = 1 << 40
    transfer(pair, 3)
    assert library(pair.receiver).reads > 0


def test_what_was_deregistered_is_read_no_more(made: Callable[..., Pair]) -> None:
    pair = made()
    source = random_bytes(SIZE, 1)
    region = pair.sender.register_memory(source.ctypes.data, SIZE)
    known = (source.ctypes.data, SIZE)
    assert known in library(pair.sender).registered
    pair.sender.deregister_memory(region)
    assert known not in library(pair.sender).registered
    transfer(pair, 2)


def test_a_library_that_hangs_keeps_its_slots(
    made: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reader, "CLOSING_S", 0.2)
    pair = made()
    hanging = library(pair.receiver)
    hanging.slow = 1 << 60
    target = np.zeros(SIZE, np.uint8)
    _, descriptor = pair.window(target, 1)
    pair.post(descriptor, random_bytes(SIZE, 1), 1)
    until_true(lambda: hanging.reads > 0)
    begun = time.monotonic()
    with caplog.at_level(logging.WARNING, logger=carried_backend.__name__):
        pair.receiver.close()
    assert time.monotonic() - begun < 5
    assert "did not end its reads in time" in caplog.text
    assert not hanging.closed
    assert (target == 0).all()


def test_mooncake_believes_no_address_that_is_none() -> None:
    engine = object.__new__(MooncakeLibrary)  # of which nothing is asked
    for description in (b"", b"10.0.0.1", b"a b:1", b"\xff:1", b"x" * 300 + b":1", b"h:123456"):
        with pytest.raises(LibraryError, match="HOST:PORT"):
            engine.meet(1, description)


def test_settings_are_named_as_the_user_gives_them() -> None:
    assert LibrarySettings()._fields == ("host", "transport", "device")
    with pytest.raises(ValueError, match="slots is 0, allowed: 1 to 1024"):
        ThisMachineBackend(slots=0)
