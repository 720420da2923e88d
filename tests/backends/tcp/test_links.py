# SPDX-License-Identifier: Apache-2.0
"""What the tcp backend makes of a peer that tells of several links, in earnest or not."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator

import pytest

from sage_kv_connector.backends.base import EventKind, Status
from sage_kv_connector.backends.tcp.backend import TcpBackend
from tests.backends.pair import PATIENCE_S, random_bytes, settle, table, until_event
from tests.backends.places import address_of
from tests.backends.tcp.wire import (
    DATA,
    ENDED,
    HEADER_BYTES,
    JOIN,
    MESSAGE,
    PREFACE,
    TAG_BYTES,
    TAKEN,
    header,
    joining,
    parse_address,
    written,
)

TOKEN = b"t" * 16


class Acceptor:
    """Plain sockets at two addresses, and a client that dialled the first."""

    def __init__(self, lanes: int = 2) -> None:
        self.servers = [socket.create_server((host, 0)) for host in ("127.0.0.1", "127.0.0.2")]
        for server in self.servers:
            server.settimeout(PATIENCE_S)
        self.client = TcpBackend(lanes=lanes)
        self.connection = self.client.connect(f"tcp://127.0.0.1:{self.servers[0].getsockname()[1]}", 5.0)
        self.first, _ = self.servers[0].accept()
        self.first.settimeout(PATIENCE_S)
        until_event(self.client, EventKind.CONNECTED)
        assert self.frame()[4] == PREFACE

    def frame(self) -> bytes:
        return self.first.recv(HEADER_BYTES, socket.MSG_WAITALL)

    def tell(self, *, lanes: int = 1) -> None:
        other = written(self.servers[1].getsockname())
        self.first.sendall(header(JOIN, token=TOKEN, offset=lanes, length=len(other)) + other)

    def closed_with(self) -> int:
        return until_event(self.client, EventKind.CLOSED).status

    def close(self) -> None:
        self.client.close()
        for each in (self.first, *self.servers):
            each.close()


@pytest.fixture
def acceptor() -> Iterator[Acceptor]:
    made = Acceptor()
    yield made
    made.close()


def test_each_link_has_a_lane_once_the_acceptor_is_trusted(acceptor: Acceptor) -> None:
    acceptor.tell()
    answer = acceptor.frame()
    assert (answer[4], struct.unpack_from("<Q", answer, 24)) == (JOIN, (1,))
    acceptor.servers[1].settimeout(0.3)
    with pytest.raises(TimeoutError):
        acceptor.servers[1].accept()
    acceptor.client.authorize(acceptor.connection)
    joined, _ = acceptor.servers[1].accept()
    with joined:
        preface = joined.recv(HEADER_BYTES + TAG_BYTES, socket.MSG_WAITALL)
        assert (preface[4], preface[40:56], struct.unpack_from("<Q", preface, 24)) == (PREFACE, TOKEN, (1,))


def test_each_link_has_a_lane_however_few_threads_there_are() -> None:
    alone = Acceptor(lanes=1)
    alone.tell(lanes=3)
    answer = alone.frame()
    assert (answer[4], struct.unpack_from("<Q", answer, 24)) == (JOIN, (1,))
    alone.client.authorize(alone.connection)
    joined, _ = alone.servers[1].accept()
    joined.close()
    alone.close()


def test_a_lane_that_ended_is_dialled_again_under_another_number(acceptor: Acceptor) -> None:
    acceptor.tell()
    acceptor.client.authorize(acceptor.connection)
    for turn in range(3):
        joined, _ = acceptor.servers[1].accept()
        preface = joined.recv(HEADER_BYTES + TAG_BYTES, socket.MSG_WAITALL)
        assert struct.unpack_from("<Q", preface, 24) == (1 + (turn << 8),)
        joined.close()
        # Only when both sides said what they took of it.
        acceptor.servers[1].settimeout(0.5)
        with pytest.raises(TimeoutError):
            acceptor.servers[1].accept()
        acceptor.servers[1].settimeout(PATIENCE_S)
        acceptor.first.sendall(header(ENDED, window=1 + (turn << 8)))
    assert [e for e in settle(acceptor.client, 0.1) if e.kind == EventKind.CLOSED] == []


def test_a_link_that_nobody_answers_is_dialled_until_somebody_does(acceptor: Acceptor) -> None:
    address = acceptor.servers[1].getsockname()
    acceptor.servers[1].close()
    other = written(address)
    acceptor.first.sendall(header(JOIN, token=TOKEN, offset=1, length=len(other)) + other)
    acceptor.client.authorize(acceptor.connection)
    assert acceptor.frame()[4] == JOIN
    for turn in range(2):
        ended = acceptor.frame()
        assert (ended[4], *struct.unpack_from("<QQ", ended, 16)) == (ENDED, 1 + (turn << 8), 0)
        if turn == 1:
            acceptor.servers[1] = socket.create_server(address)
        acceptor.first.sendall(header(ENDED, window=1 + (turn << 8)))
    acceptor.servers[1].settimeout(PATIENCE_S)
    joined, _ = acceptor.servers[1].accept()
    with joined:
        preface = joined.recv(HEADER_BYTES, socket.MSG_WAITALL)
        assert struct.unpack_from("<Q", preface, 24) == (1 + (2 << 8),)


OTHER = written(("127.0.0.2", 9))


@pytest.mark.parametrize(
    "frames",
    [
        header(JOIN, offset=1, length=25) + OTHER + b"x",
        header(JOIN, offset=1, length=24) + written(("127.0.0.2", 9), family=9),
        header(JOIN, offset=1, length=17 * 24) + 17 * OTHER,
        (header(JOIN, offset=1, length=24) + OTHER) * 2,
        header(JOIN, offset=1, length=24) + OTHER + header(TAKEN, offset=1),
        header(JOIN, offset=1, length=24) + OTHER + header(TAKEN, offset=2**64 - 1),
        header(JOIN, offset=1, length=24) + OTHER + header(TAKEN, length=1),
        header(JOIN, offset=1, length=24) + OTHER + header(ENDED, length=1),
    ],
    ids=["cut", "family", "many", "twice", "taken", "taken-all", "taken-payload", "ended-payload"],
)
def test_a_peer_that_breaks_the_protocol_is_closed(acceptor: Acceptor, frames: bytes) -> None:
    acceptor.client.authorize(acceptor.connection)
    acceptor.first.sendall(frames)
    assert acceptor.closed_with() == Status.PROTOCOL_ERROR


def test_what_is_still_leaving_can_not_have_been_taken(acceptor: Acceptor) -> None:
    """Else its memory would be given back while it is read."""
    acceptor.tell()
    acceptor.client.authorize(acceptor.connection)
    assert acceptor.frame()[4] == JOIN
    source = random_bytes(64 << 20)
    acceptor.client.register_memory(address_of(source), source.nbytes)
    window = struct.pack("<QQQ", 1, 1, source.nbytes)
    acceptor.client.post(acceptor.connection, window, table([(address_of(source), 0, source.nbytes)]), 1)
    assert acceptor.frame()[4] == DATA
    time.sleep(0.2)  # it fills what the kernel takes, and waits in the middle of a frame
    acceptor.first.sendall(header(TAKEN, offset=1000))
    assert acceptor.closed_with() == Status.PROTOCOL_ERROR


def test_a_peer_that_tells_of_ends_without_end_is_borne(acceptor: Acceptor) -> None:
    acceptor.tell()
    acceptor.client.authorize(acceptor.connection)
    assert acceptor.frame()[4] == JOIN
    acceptor.first.sendall(b"".join(header(ENDED, window=n, offset=n) for n in range(2, 20_000)))
    acceptor.first.sendall(header(ENDED, window=2**64 - 1, offset=2**64 - 1))
    acceptor.first.sendall(header(MESSAGE, length=3) + b"hey")
    assert until_event(acceptor.client, EventKind.MESSAGE).payload == b"hey"


def test_a_lane_joins_once_and_with_the_token_alone() -> None:
    listener = TcpBackend(links=("127.0.0.1", "127.0.0.2"))
    address = parse_address(listener.listen("tcp://127.0.0.1:0"))

    def refused(*data: bytes) -> bool:
        with socket.create_connection(address, timeout=PATIENCE_S) as stranger:
            stranger.sendall(b"".join(data))
            return stranger.recv(1) == b""

    with socket.create_connection(address, timeout=PATIENCE_S) as first:
        first.sendall(header(PREFACE))
        listener.authorize(until_event(listener, EventKind.ACCEPTED).connection)
        invitation = first.recv(HEADER_BYTES, socket.MSG_WAITALL)
        told = first.recv(24, socket.MSG_WAITALL)
        token = invitation[40:56]
        assert told[8:12] == socket.inet_aton("127.0.0.2")
        elsewhere = ("127.0.0.2", struct.unpack_from(">H", told, 2)[0])
        first.sendall(header(JOIN, offset=1))
        with socket.create_connection(elsewhere, timeout=PATIENCE_S) as joined:
            joined.sendall(joining(token))
            joined.sendall(header(MESSAGE, length=3) + b"hey")
            assert until_event(listener, EventKind.MESSAGE).payload == b"hey"
            # In use; the first lane itself; of a turn before the last one ended; of no lane; of somebody else.
            for number in (1, 0, 1 + (1 << 8), 2, 15, 2**64 - 1):
                assert refused(joining(token, number)), number
            assert refused(joining(bytes(16 * b"x"), 1))
    listener.close()


def test_who_opens_no_lane_is_sent_no_counts() -> None:
    listener = TcpBackend(links=("127.0.0.1", "127.0.0.2"))
    address = parse_address(listener.listen("tcp://127.0.0.1:0"))
    with socket.create_connection(address, timeout=PATIENCE_S) as first:
        first.sendall(header(PREFACE))
        listener.authorize(until_event(listener, EventKind.ACCEPTED).connection)
        assert first.recv(HEADER_BYTES, socket.MSG_WAITALL)[4] == JOIN
        first.recv(24, socket.MSG_WAITALL)
        first.sendall(header(JOIN, offset=0) + header(MESSAGE, length=3) + b"hey")
        assert until_event(listener, EventKind.MESSAGE).payload == b"hey"
        first.sendall(header(TAKEN))
        assert until_event(listener, EventKind.CLOSED).status == Status.PROTOCOL_ERROR
    listener.close()
