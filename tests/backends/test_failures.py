# SPDX-License-Identifier: Apache-2.0
"""Dead, silent, lying and hostile peers; and that nothing is left behind or busy when idle."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from integration_tests.tcp_proxy import TcpProxy
from sage_kv_connector.backends.base import Backend, EventKind, Status
from tests.backends.pair import KINDS, Inbox, Pair, from_start, listen, memory, whole

BYTES = 64 << 20


@contextmanager
def peer(kind: str, size: int = BYTES) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.backends.peer", kind, str(size)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def connect(backend: Backend, address: str) -> tuple[Inbox, int]:
    inbox = Inbox(backend)
    connection = backend.connect(address, 5.0)
    inbox.take(EventKind.CONNECTED)
    backend.authorize(connection)
    return inbox, connection


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_sender_fails_the_window_and_closes_soon(kind: str) -> None:
    with peer(kind) as (process, address):
        backend = KINDS[kind]()
        inbox, connection = connect(backend, address)
        target = memory(backend, 2 * BYTES)  # more than the peer sends: it can't end by itself
        window = backend.open_window(connection, whole(target), 1)
        backend.send(connection, backend.window_descriptor(window))
        time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        begun = time.monotonic()
        failed = inbox.take(EventKind.WINDOW_FAILED)
        inbox.take(EventKind.CLOSED)
        assert failed.id == window
        assert time.monotonic() - begun < 5
        backend.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_peer_costs_no_cpu(kind: str) -> None:
    with peer(kind, 1 << 20) as (process, address):
        backend = KINDS[kind]()
        _, connection = connect(backend, address)
        time.sleep(0.2)
        process.send_signal(signal.SIGSTOP)
        target = memory(backend, 1 << 20)
        window = backend.open_window(connection, whole(target), 1)
        backend.send(connection, backend.window_descriptor(window))
        time.sleep(0.3)
        before = time.process_time()
        time.sleep(1.5)
        assert time.process_time() - before < 0.1
        process.send_signal(signal.SIGCONT)
        backend.close()


def test_idle_backends_cost_no_cpu() -> None:
    pairs = [Pair(kind).authorize() for kind in KINDS]
    time.sleep(0.3)
    before = time.process_time()
    time.sleep(2.0)
    assert time.process_time() - before < 0.05
    for pair in pairs:
        pair.__exit__()


@pytest.mark.parametrize("kind", KINDS)
def test_close_gives_everything_back(kind: str) -> None:
    with Pair(kind):
        pass  # what the process loads at the first use stays
    before = held()
    for _ in range(5):
        with Pair(kind) as pair:
            source, target = memory(pair.sender, 1 << 20, seed=1), memory(pair.receiver, 1 << 20)
            window = pair.receiver.open_window(pair.incoming, whole(target), 1)
            pair.sender.post(pair.outgoing, pair.receiver.window_descriptor(window), from_start(source), 1)
            pair.landed.take(EventKind.WINDOW_DONE)
    assert held() == before


def held() -> tuple[int, int, list[str]]:
    """(descriptors, threads, names in /dev/shm)."""
    return (
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
        sorted(path.name for path in Path("/dev/shm").iterdir()),
    )


def test_a_byte_flipped_on_the_wire_is_a_checksum_mismatch() -> None:
    with Pair("tcp") as direct:
        proxy = TcpProxy(int(direct.incoming_address.rpartition(":")[2]))
        backend = KINDS["tcp"]()
        inbox, connection = connect(backend, f"tcp://127.0.0.1:{proxy.port}")
        outgoing = direct.sent.take(EventKind.ACCEPTED).connection
        direct.sender.authorize(outgoing)
        source, target = memory(direct.sender, 1 << 20, seed=1), memory(backend, 1 << 20)
        window = backend.open_window(connection, whole(target), 1)
        proxy.flip_byte_at(500_000)
        direct.sender.post(outgoing, backend.window_descriptor(window), from_start(source), 1)
        failed = inbox.take(EventKind.WINDOW_FAILED)
        assert proxy.flipped
        assert failed.status == Status.CHECKSUM_MISMATCH
        assert not np.array_equal(source, target)
        backend.close()
        proxy.close()


HOSTILE = {
    "zeros": bytes(4096),
    "text": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 20,
    "ones": b"\xff" * 4096,
    "short": b"SKVT",
    "nothing": b"",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_stranger_on_the_port_harms_nobody(what: str) -> None:
    with Pair("tcp") as pair:
        port = int(pair.incoming_address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(HOSTILE[what])
            with suppress(OSError):  # it may have been closed already
                stranger.shutdown(socket.SHUT_WR)
            stranger.settimeout(5)
            with pytest.raises((ConnectionError, AssertionError)):
                assert stranger.recv(1), "the connection was closed"
                raise AssertionError
        pair.sender.send(pair.outgoing, b"still here")
        assert pair.landed.take(EventKind.MESSAGE).payload == b"still here"
        assert not any(e.kind == EventKind.ACCEPTED for e in pair.sent.seen)


def test_strangers_beyond_the_limit_are_turned_away() -> None:
    with Pair("tcp") as pair:
        port = int(pair.incoming_address.rpartition(":")[2])
        strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
        time.sleep(0.5)
        turned_away = 0
        for stranger in strangers:
            stranger.setblocking(False)
            try:
                turned_away += stranger.recv(1) == b""
            except BlockingIOError:
                pass
            except ConnectionError:
                turned_away += 1
        for stranger in strangers:
            stranger.close()
        assert turned_away >= 36
        time.sleep(0.3)
        backend = KINDS["tcp"]()
        connect(backend, pair.incoming_address)
        backend.close()


def test_an_unauthorized_peer_can_send_little_and_no_data() -> None:
    pair = Pair("tcp")
    with pytest.raises(ValueError, match="at most 65536"):
        pair.receiver.send(pair.incoming, bytes(65537))
    data = memory(pair.sender, 4096, seed=1)
    target = memory(pair.receiver, 4096)
    window = pair.receiver.open_window(pair.incoming, whole(target), 1)
    pair.sender.authorize(pair.outgoing)  # one side trusts, the other does not yet
    pair.sender.post(pair.outgoing, pair.receiver.window_descriptor(window), from_start(data), 1)
    pair.landed.take(EventKind.CLOSED)
    assert not target.any()
    pair.__exit__()


def test_a_full_message_queue_says_so() -> None:
    with peer("tcp", 4096) as (process, address):
        backend = KINDS["tcp"]()
        _, connection = connect(backend, address)
        time.sleep(0.3)  # the peer trusts us by now, so long messages are no offence
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(BlockingIOError):
            for _ in range(200):
                backend.send(connection, bytes(1 << 20))
        backend.close()


def test_listen_on_a_taken_port_names_the_address() -> None:
    with Pair("tcp") as pair, pytest.raises(OSError, match=r"127\.0\.0\.1"):
        KINDS["tcp"]().listen(pair.incoming_address)
    assert listen(KINDS["shm-direct"]()).startswith("shm://sage-kvt-")
