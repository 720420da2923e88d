# SPDX-License-Identifier: Apache-2.0
"""Descriptors, threads, mappings and CPU time: what a backend holds, and that it gives it back."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Callable

import numpy as np
import pytest

from sage_kv_connector.backends.base import EventKind
from tests.backends.kinds import Kind
from tests.backends.pair import Pair, of_kind, random_bytes, settle, until, until_event

IDLE_S = 2.0
#: Two idle backends together; a spinning lane would use all of IDLE_S.
IDLE_CPU_S = 0.02


def _held() -> tuple[int, int, int]:
    """Open descriptors, threads and shared mappings of this process."""
    with open("/proc/self/maps") as maps:
        shared = sum("memfd:sage-kvt" in line for line in maps)
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), shared


def _held_in_the_end(wanted: tuple[int, int, int]) -> tuple[int, int, int]:
    """What is held once it is ``wanted``, or after 2 s: the kernel lets go of a thread after Python joined it."""
    deadline = time.monotonic() + 2.0
    while _held() != wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    return _held()


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.usefixtures("collected")
def test_close_gives_everything_back(kind: Kind) -> None:
    before = _held()
    kept = []
    for _ in range(3):
        pair = Pair(kind)
        target = np.zeros(1 << 20, np.uint8)
        _, descriptor = pair.window(target)
        pair.post(descriptor, random_bytes(1 << 20))
        pair.close()
        kept.append(pair)  # closing is enough, nobody has to forget the object
    assert _held_in_the_end(before) == before


@pytest.mark.usefixtures("collected")
def test_a_closed_connection_gives_everything_back(kind: Kind) -> None:
    backend, other = kind.make(), kind.make()
    address = backend.listen(kind.listen_on)
    settle(backend, 0.05)
    before = (0, 0, 0)
    for number in range(11):
        if number == 1:  # what a backend sets up once, at its first connection, it may keep
            settle(other, 0.1)
            before = _held()
        connection = other.connect(address, 5.0)
        until_event(other, EventKind.CONNECTED)
        until_event(backend, EventKind.ACCEPTED)
        other.close_connection(connection)
        until_event(backend, EventKind.CLOSED)
    assert _held_in_the_end(before) == before  # the lanes let go of what is dead a moment later
    backend.close()
    other.close()


def test_idle_backends_use_no_cpu(make_pair: Callable[..., Pair]) -> None:
    for options in ({}, {"spin_us": 0}):
        pair = make_pair(**options)
        pair.transfers_still_work()
        settle(pair.sender, 0.1)
        before = _cpu_s()
        time.sleep(IDLE_S)
        assert _cpu_s() - before < IDLE_CPU_S
        pair.close()


def test_an_inbox_nobody_empties_uses_no_cpu(pair: Pair) -> None:
    for _ in range(24):
        try:
            pair.sender.send(pair.to_receiver, bytes(pair.kind.longest_message(1 << 20)))
        except BlockingIOError:
            settle(pair.sender, 0.1)
    settle(pair.sender, 0.2)
    before = _cpu_s()
    time.sleep(IDLE_S)
    assert _cpu_s() - before < IDLE_CPU_S
    pair.sender.close_connection(pair.to_receiver)
    time.sleep(0.1)
    before = _cpu_s()
    time.sleep(IDLE_S)
    assert _cpu_s() - before < IDLE_CPU_S
    until(pair.receiver, lambda all: bool(of_kind(all, EventKind.CLOSED)))


def test_a_full_descriptor_table_does_not_make_the_listener_spin(kind: Kind) -> None:
    backend = kind.make()
    address = backend.listen(kind.listen_on)
    if kind.stranger is None:
        pytest.skip(f"how a stranger reaches {kind.name} is not known here")
    family, sort, target = kind.stranger(address)
    strangers = [socket.socket(family, sort) for _ in range(3)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
    fillers = []
    try:
        while True:
            fillers.append(os.dup(0))
    except OSError:
        pass
    try:
        for stranger in strangers:
            stranger.setblocking(False)
            stranger.connect_ex(target)
        before = _cpu_s()
        time.sleep(0.5)
        spent = _cpu_s() - before
    finally:
        for filler in fillers:
            os.close(filler)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert spent < 0.1
    for stranger in strangers:
        stranger.close()
    client = kind.make()
    client.connect(address, 5.0)
    until_event(client, EventKind.CONNECTED)
    client.close()
    backend.close()
