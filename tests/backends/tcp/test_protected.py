# SPDX-License-Identifier: Apache-2.0
"""What somebody on the way can do to a protected connection: nothing but end it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from sage_kv_connector._data_plane import crc32c
from sage_kv_connector.backends.base import Event, EventKind, Status
from sage_kv_connector.backends.protecting_backend import LANE_KEYS_BYTES, TrafficKeys
from sage_kv_connector.backends.tcp.backend import TcpBackend
from tests.backends.pair import PATIENCE_S, Inbox, random_bytes, table
from tests.backends.places import Bytes, address_of
from tests.backends.tcp.wire import (
    DATA,
    HEADER_BYTES,
    MESSAGE,
    PONG,
    PREFACE,
    TAG_BYTES,
    Proxy,
    header,
    joining,
    parse_address,
)

TRAILER_BYTES = 16
CHUNK = 64 << 10
CONNECTOR, ACCEPTOR = (np.random.default_rng(seed).bytes(LANE_KEYS_BYTES) for seed in (1, 2))


def start_bytes(head: bytes) -> int:
    """Of a frame's header and its tag; the first one of a connection has none."""
    return HEADER_BYTES if head[4] == PREFACE and head[40:56] == bytes(16) else HEADER_BYTES + TAG_BYTES


def frame_bytes(head: bytes) -> int:
    length = int.from_bytes(head[8:16], "little")
    body = length + TAG_BYTES if length else 0
    return start_bytes(head) + body + (TRAILER_BYTES if head[4] == DATA else 0)


def mended(frame: bytes) -> bytes:
    """With a header checksum that is right."""
    return frame[:60] + crc32c(frame[:60]).to_bytes(4, "little") + frame[64:]


def flipped(frame: bytes, at: int) -> bytes:
    return frame[:at] + bytes([frame[at] ^ 0x10]) + frame[at + 1 :]


class Frames:
    """Whole frames of each connection, through ``change``; it may give back any bytes."""

    def __init__(self, change: Callable[[bytes], bytes] = lambda frame: frame) -> None:
        self.change = change
        self.seen: list[bytes] = []
        self._waiting: dict[int, bytes] = {}

    def __call__(self, position: int, data: bytes) -> bytes:
        mine = threading.get_ident()
        waiting = (b"" if position == 0 else self._waiting[mine]) + data
        out = b""
        while len(waiting) >= HEADER_BYTES and len(waiting) >= (size := frame_bytes(waiting)):
            frame, waiting = waiting[:size], waiting[size:]
            self.seen.append(frame)
            out += self.change(frame)
        self._waiting[mine] = waiting
        return out


class Side:
    def __init__(self, lanes: int) -> None:
        self.backend = TcpBackend(lanes=lanes, chunk_bytes=CHUNK)
        self.inbox = Inbox(self.backend)
        self.connection = 0


class Relayed:
    """A sender that connects through a proxy, and a receiver."""

    def __init__(
        self,
        *,
        encrypts: bool = True,
        lanes: int = 1,
        there: Callable[[bytes], bytes] = lambda frame: frame,
    ) -> None:
        self.there, self.back = Frames(there), Frames()
        self._kept: list[Bytes] = []
        self.receiver, self.sender = Side(lanes), Side(lanes)
        self.address = self.receiver.backend.listen("tcp://127.0.0.1:0")
        self.proxy = Proxy(self.address, self.there, self.back)
        self.sender.connection = self.sender.backend.connect(self.proxy.address, PATIENCE_S)
        self.sender.inbox.next(EventKind.CONNECTED)
        self.receiver.connection = self.receiver.inbox.next(EventKind.ACCEPTED).connection
        self.sender.backend.protect(self.sender.connection, TrafficKeys(encrypts, CONNECTOR, ACCEPTOR))
        self.receiver.backend.protect(self.receiver.connection, TrafficKeys(encrypts, ACCEPTOR, CONNECTOR))
        for side in (self.sender, self.receiver):
            side.backend.authorize(side.connection)

    def post(self, source: Bytes, target: Bytes) -> int:
        """All of the source into a window; returns that."""
        self._kept += [source, target]  # lanes work on them after this
        self.receiver.backend.register_memory(address_of(target), target.nbytes)
        self.sender.backend.register_memory(address_of(source), source.nbytes)
        window = self.receiver.backend.open_window(
            self.receiver.connection, table([(address_of(target), target.nbytes)]), 7
        )
        descriptor = self.receiver.backend.window_descriptor(window)
        self.sender.backend.post(
            self.sender.connection, descriptor, table([(address_of(source), 0, source.nbytes)]), 7
        )
        return window

    def failed(self, window: int) -> Event:
        event = self.receiver.inbox.next(EventKind.WINDOW_FAILED, window)
        closed = self.receiver.inbox.next(EventKind.CLOSED)
        assert (closed.status, closed.connection) == (Status.FORGED, self.receiver.connection)
        assert self.receiver.backend.counters()["forged_frames"] == 1
        return event

    def close(self) -> None:
        for side in (self.sender, self.receiver):
            side.backend.close()
        self.proxy.close()


@pytest.fixture(params=[False, True], ids=["authenticated", "encrypted"])
def relayed(request: pytest.FixtureRequest) -> Iterator[Relayed]:
    made = Relayed(encrypts=request.param)
    yield made
    made.close()


# -- changed, left out, repeated, put in


IN_HEADER = {"type": 4, "flags": 5, "length": 8, "window": 16, "offset": 24, "generation": 32, "token": 40}


@pytest.mark.parametrize("field", IN_HEADER)
def test_a_changed_header_with_its_checksum_mended_is_found_out(relayed: Relayed, field: str) -> None:
    relayed.there.change = lambda frame: (
        mended(flipped(frame, IN_HEADER[field])) if frame[4] == DATA else frame
    )
    source, target = random_bytes(CHUNK), np.zeros(CHUNK, np.uint8)
    relayed.failed(relayed.post(source, target))
    assert not target.any(), "nothing of a header is believed before its tag"


IN_FRAME = {
    "its tag": HEADER_BYTES,
    "first byte": HEADER_BYTES + TAG_BYTES,
    "middle": HEADER_BYTES + TAG_BYTES + CHUNK // 2,
    "last byte": HEADER_BYTES + TAG_BYTES + CHUNK - 1,
    "aborted": HEADER_BYTES + TAG_BYTES + CHUNK + 4,
    "generation": HEADER_BYTES + TAG_BYTES + CHUNK + 8,
    "tag": HEADER_BYTES + 2 * TAG_BYTES + CHUNK,
}


@pytest.mark.parametrize("where", IN_FRAME)
def test_a_changed_byte_of_a_chunk_is_found_out(relayed: Relayed, where: str) -> None:
    frames = 0

    def change(frame: bytes) -> bytes:
        nonlocal frames
        frames += frame[4] == DATA
        return flipped(frame, IN_FRAME[where]) if frame[4] == DATA and frames == 3 else frame

    relayed.there.change = change
    source, target = random_bytes(5 * CHUNK), np.zeros(5 * CHUNK, np.uint8)
    event = relayed.failed(relayed.post(source, target))
    assert event.status in (Status.FORGED, Status.CONNECTION_LOST)
    assert np.array_equal(source[: 2 * CHUNK], target[: 2 * CHUNK])


def test_a_changed_message_is_found_out(relayed: Relayed) -> None:
    relayed.there.change = lambda frame: (
        flipped(frame, HEADER_BYTES + TAG_BYTES) if frame[4] == MESSAGE else frame
    )
    relayed.sender.backend.send(relayed.sender.connection, b"cancel")
    assert relayed.receiver.inbox.next(EventKind.CLOSED).status == Status.FORGED
    assert relayed.receiver.backend.counters()["messages_received"] == 0


ATTACKS: dict[str, Callable[[Relayed, bytes], bytes]] = {
    "again": lambda relayed, frame: frame + frame,
    "left out": lambda relayed, frame: b"",
    "reflected": lambda relayed, frame: relayed.back.seen[-1] + frame,
    "not sealed": lambda relayed, frame: header(MESSAGE, length=3) + b"hey" + frame,
    "zeros for tags": lambda relayed, frame: (
        header(MESSAGE, length=3) + bytes(16) + b"hey" + bytes(16) + frame
    ),
    "a ping": lambda relayed, frame: header(5) + bytes(16) + frame,
    "a preface": lambda relayed, frame: header(PREFACE) + frame,
    "noise": lambda relayed, frame: random_bytes(999, 3).tobytes() + frame,
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_the_peer_did_not_send_now_ends_the_connection(relayed: Relayed, attack: str) -> None:
    relayed.receiver.backend.send(relayed.receiver.connection, b"back")
    assert relayed.sender.inbox.next(EventKind.MESSAGE).payload == b"back"
    harmed = False

    def change(frame: bytes) -> bytes:
        nonlocal harmed
        if harmed or frame[4] != MESSAGE:
            return frame
        harmed = True
        return ATTACKS[attack](relayed, frame)

    relayed.there.change = change
    relayed.sender.backend.send(relayed.sender.connection, b"one")
    relayed.sender.backend.send(relayed.sender.connection, b"two")
    assert relayed.receiver.inbox.next(EventKind.CLOSED).status == Status.FORGED
    assert relayed.receiver.backend.counters()["messages_received"] == (1 if attack == "again" else 0)


def test_a_truncated_chunk_does_not_count(relayed: Relayed) -> None:
    def change(frame: bytes) -> bytes:
        if frame[4] != DATA:
            return frame
        threading.Thread(target=relayed.proxy.close).start()
        return frame[:-1]

    relayed.there.change = change
    window = relayed.post(random_bytes(CHUNK), np.zeros(CHUNK, np.uint8))
    assert relayed.receiver.inbox.next(EventKind.WINDOW_FAILED, window).status == Status.CONNECTION_LOST


# -- what can be read


@pytest.mark.parametrize("encrypts", [False, True])
def test_encrypted_bytes_are_not_seen_on_the_wire(encrypts: bool) -> None:
    relayed = Relayed(encrypts=encrypts)
    source, target = random_bytes(CHUNK), np.zeros(CHUNK, np.uint8)
    window = relayed.post(source, target)
    relayed.receiver.inbox.next(EventKind.WINDOW_DONE, window)
    relayed.sender.backend.send(relayed.sender.connection, b"a question of a hundred bytes" * 4)
    relayed.receiver.inbox.next(EventKind.MESSAGE)
    wire = b"".join(relayed.there.seen)
    for part in (source[:64].tobytes(), source[-64:].tobytes(), b"a question of a hundred bytes"):
        assert (part in wire) is not encrypts
    relayed.close()


def test_the_same_bytes_never_look_the_same() -> None:
    """Zeros twice, on two lanes and in both directions: no block of the cipher comes again."""
    relayed = Relayed(lanes=2)
    for _ in range(8):
        window = relayed.post(np.zeros(4 * CHUNK, np.uint8), np.ones(4 * CHUNK, np.uint8))
        relayed.receiver.inbox.next(EventKind.WINDOW_DONE, window)
    relayed.receiver.backend.send(relayed.receiver.connection, bytes(CHUNK))
    relayed.sender.inbox.next(EventKind.MESSAGE)
    bodies = [
        frame[start_bytes(frame) : -TAG_BYTES - TRAILER_BYTES]
        for frame in relayed.there.seen + relayed.back.seen
        if frame[4] in (DATA, MESSAGE)
    ]
    blocks = [body[i : i + 16] for body in bodies for i in range(0, len(body) - 15, 16)]
    assert len(blocks) > 8 * 4 * CHUNK // 16 and len(set(blocks)) == len(blocks)
    relayed.close()


# -- lanes that join


def test_a_lane_joins_by_its_tag_and_once() -> None:
    """With the token alone, which anybody on the way can read, nobody joins."""
    kept: list[bytes] = []

    def keep(frame: bytes) -> bytes:
        joins = frame[4] == PREFACE and frame[40:56] != bytes(16)
        if joins:
            kept.append(frame)
        return b"" if joins else frame

    relayed = Relayed(lanes=3, there=keep)
    deadline = time.monotonic() + PATIENCE_S
    while len(kept) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    address = parse_address(relayed.address)
    first = kept[0]
    token, tag = first[40:56], first[HEADER_BYTES:]
    number, free = (int.from_bytes(one[24:32], "little") for one in kept)
    assert {number, free} == {1, 2}

    def is_hung_up_on(preface: bytes) -> bool:
        with socket.create_connection(address, timeout=PATIENCE_S) as stranger:
            stranger.sendall(preface)
            return stranger.recv(1) == b""

    for forged in (
        joining(token, number),
        joining(token, free, tag),
        joining(token, 3, tag),
        joining(token, 99, tag),
        flipped(first, HEADER_BYTES),
    ):
        assert is_hung_up_on(forged)
    with socket.create_connection(address, timeout=PATIENCE_S) as lane:
        lane.sendall(first)
        assert lane.recv(HEADER_BYTES, socket.MSG_WAITALL)[4] == PONG
        assert is_hung_up_on(first), "it has joined"
        assert relayed.receiver.backend.connection_info(relayed.receiver.connection).lanes == 2
    relayed.close()


def test_keys_are_checked_and_given_once() -> None:
    relayed = Relayed()
    good = TrafficKeys(True, CONNECTOR, ACCEPTOR)
    with pytest.raises(ValueError, match=r"connection \d+ is authorized or protected already"):
        relayed.sender.backend.protect(relayed.sender.connection, good)
    with pytest.raises(ValueError, match="send_keys has 5 bytes, must have 448"):
        relayed.sender.backend.protect(relayed.sender.connection, good._replace(send=b"short"))
    relayed.sender.backend.protect(12345, good)  # one that is gone
    relayed.close()
