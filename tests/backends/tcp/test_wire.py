# SPDX-License-Identifier: Apache-2.0
"""What the tcp backend makes of bytes that no well-behaved peer sends."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sage_kv_connector._data_plane import crc32c
from sage_kv_connector.backends.base import Event, EventKind, Status
from sage_kv_connector.backends.tcp.backend import TcpBackend
from tests.backends.pair import (
    PATIENCE_S,
    Inbox,
    of_kind,
    random_bytes,
    settle,
    table,
    until,
    until_event,
)
from tests.backends.places import address_of
from tests.backends.tcp.wire import (
    DATA,
    ENDED,
    HEADER_BYTES,
    JOIN,
    MESSAGE,
    PING,
    PONG,
    PREFACE,
    TAG_BYTES,
    TAKEN,
    Proxy,
    header,
    joining,
    parse_address,
    trailer,
)

CHUNK = 64 << 10
UNAUTHORIZED_CONNECTIONS = 64
FLOOD_BYTES = 16 << 20


class Listener:
    """A backend that listens, and strangers that connect to it with plain sockets."""

    def __init__(self) -> None:
        self.backend = TcpBackend(lanes=2)
        self.address = self.backend.listen("tcp://127.0.0.1:0")
        self.inbox = Inbox(self.backend)

    def stranger(self, *data: bytes) -> socket.socket:
        made = socket.create_connection(parse_address(self.address), timeout=PATIENCE_S)
        made.sendall(b"".join(data))
        return made

    def accepted(self) -> int:
        return self.inbox.next(EventKind.ACCEPTED).connection

    def closed(self) -> Event:
        return self.inbox.next(EventKind.CLOSED)

    def quiet(self, quiet_s: float = 0.2) -> bool:
        """Nothing comes that is of a peer."""
        return all(event.kind == EventKind.TURNED_AWAY for event in settle(self.backend, quiet_s))

    def serves(self) -> None:
        """An honest peer still gets its bytes through."""
        client = TcpBackend(lanes=2)
        here = client.connect(self.address, 5.0)
        until_event(client, EventKind.CONNECTED)
        there = self.accepted()
        client.authorize(here)
        self.backend.authorize(there)
        self.carries(client, here, there)
        client.close()
        self.closed()

    def carries(self, client: TcpBackend, here: int, there: int) -> None:
        """Bytes of a client get through its connection."""
        source, target = random_bytes(1 << 20), np.zeros(1 << 20, np.uint8)
        region = self.backend.register_memory(address_of(target), target.nbytes)
        client.register_memory(address_of(source), source.nbytes)
        window = self.backend.open_window(there, table([(address_of(target), target.nbytes)]), 1)
        rows = table([(address_of(source), 0, source.nbytes)])
        client.post(here, self.backend.window_descriptor(window), rows, 1)
        self.inbox.next(EventKind.WINDOW_DONE, window)
        assert np.array_equal(source, target)
        self.backend.close_window(window)
        self.backend.deregister_memory(region)


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.backend.close()


def skip_invitation(stranger: socket.socket) -> None:
    """The frame with which an acceptor of several lanes begins once it trusts a peer."""
    stranger.settimeout(PATIENCE_S)
    assert stranger.recv(HEADER_BYTES, socket.MSG_WAITALL)[4] == JOIN


def received(stranger: socket.socket) -> bytes:
    """All until the other end closed."""
    data = b""
    while more := stranger.recv(1 << 16):
        data += more
    return data


def resident_bytes() -> int:
    """Of this process."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def hangs_up(stranger: socket.socket) -> bool:
    """The other end closed; what it had sent before is skipped."""
    try:
        while stranger.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


# -- a byte that changed on its way


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("where", ["first", "middle", "last", "crc"])
def test_one_flipped_byte_of_a_chunk_is_a_checksum_mismatch(lanes: int, where: str) -> None:
    receiver, sender = TcpBackend(lanes=lanes), TcpBackend(lanes=lanes, chunk_bytes=CHUNK)
    # The first lane's stream: preface, message, then frames of one chunk each. Its second chunk is hit; the others
    # wait for that, so that it gets as far.
    data = 2 * HEADER_BYTES
    frame = HEADER_BYTES + CHUNK + 16
    hit = data + frame + {"first": 0, "middle": CHUNK // 2, "last": CHUNK - 1, "crc": CHUNK}[where]
    flips: list[int] = []
    flipped = threading.Event()
    joined: set[int] = set()  # threads of the proxy that forward other lanes

    def flip(position: int, chunk: bytes) -> bytes:
        if position == 0 and any(chunk[40:56]):  # a token
            joined.add(threading.get_ident())
        if threading.get_ident() in joined:
            if position:
                flipped.wait(PATIENCE_S)
            return chunk
        if position <= hit < position + len(chunk) and not flips:
            flips.append(hit)
            changed = bytearray(chunk)
            changed[hit - position] ^= 0x10
            flipped.set()
            return bytes(changed)
        return chunk

    proxy = Proxy(receiver.listen("tcp://127.0.0.1:0"), flip)
    try:
        here = sender.connect(proxy.address, 5.0)
        until_event(sender, EventKind.CONNECTED)
        there = until_event(receiver, EventKind.ACCEPTED).connection
        sender.authorize(here)
        receiver.authorize(there)
        size = 512 * CHUNK  # more than the sockets of a lane that waits hold
        source, target = random_bytes(size), np.zeros(size, np.uint8)
        receiver.register_memory(address_of(target), target.nbytes)
        sender.register_memory(address_of(source), source.nbytes)
        window = receiver.open_window(there, table([(address_of(target), target.nbytes)]), 1)
        rows = table([(address_of(source), 0, source.nbytes)])
        sender.post(here, receiver.window_descriptor(window), rows, 1)
        failed = until_event(receiver, EventKind.WINDOW_FAILED, window)
        assert (failed.status, failed.length) == (Status.CHECKSUM_MISMATCH, CHUNK)
        assert flips and "crc32c" in failed.detail
        until_event(sender, EventKind.SENT)
        assert receiver.counters()["checksum_failures"] == 1
        deadline = time.monotonic() + PATIENCE_S  # the others still land
        while receiver.counters()["chunks_landed"] < size // CHUNK - 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not of_kind(settle(receiver), EventKind.WINDOW_DONE)
        wrong = np.flatnonzero(source != target)
        assert all(failed.offset <= at < failed.offset + CHUNK for at in wrong)
        assert len(wrong) == (0 if where == "crc" else 1)
    finally:
        sender.close()
        receiver.close()
        proxy.close()


# -- strangers


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(garbage=st.binary(min_size=64, max_size=4096))
def test_garbage_is_hung_up_on(listener: Listener, garbage: bytes) -> None:
    with listener.stranger(garbage) as stranger:
        assert hangs_up(stranger)
    assert listener.quiet(0.01)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.integers(0, 255),
    flags=st.integers(0, 255),
    length=st.one_of(st.integers(0, 4096), st.integers(0, 2**64 - 1)),
    offset=st.integers(0, 2**64 - 1),
    window=st.integers(0, 2**64 - 1),
)
def test_frames_with_any_fields_before_authorize(
    listener: Listener, kind: int, flags: int, length: int, offset: int, window: int
) -> None:
    hostile = header(kind, flags=flags, length=length, offset=offset, window=window, generation=1)
    with listener.stranger(header(PREFACE), hostile) as stranger:
        connection = listener.accepted()
        if kind == MESSAGE and length <= 4096:
            stranger.sendall(bytes(length))
            assert len(listener.inbox.next(EventKind.MESSAGE).payload) == length
        elif kind == MESSAGE and length <= CHUNK:
            pass  # waits for the rest
        else:
            assert hangs_up(stranger)
            assert listener.closed().status == Status.PROTOCOL_ERROR
            return
        listener.backend.close_connection(connection)
        listener.closed()


def test_every_truncation_of_a_stream_ends_quietly(listener: Listener) -> None:
    stream = header(PREFACE) + header(MESSAGE, length=10) + bytes(10)
    events: list[Event] = []
    for size in range(len(stream)):
        listener.stranger(stream[:size]).close()
        if size % 32 == 0:  # no more of them at once than strangers may be
            events += settle(listener.backend, 0.1)
    events += settle(listener.backend, 0.3)
    accepted = [e.connection for e in of_kind(events, EventKind.ACCEPTED)]
    assert len(accepted) == len(stream) - HEADER_BYTES
    assert sorted(e.connection for e in of_kind(events, EventKind.CLOSED)) == sorted(accepted)
    assert {e.status for e in of_kind(events, EventKind.CLOSED)} == {Status.CONNECTION_LOST}
    listener.serves()


@pytest.mark.parametrize(
    "frame",
    [
        header(DATA, length=0, window=1, generation=1),
        header(DATA, length=(64 << 20) + 1, window=1, generation=1),
        header(DATA, length=2**64 - 1, window=1, generation=1),
        header(MESSAGE, length=(1 << 20) + 1),
        header(JOIN, token=b"x" * 16, offset=3),
        header(PREFACE),
        header(JOIN, offset=1),
        header(TAKEN),
        header(ENDED),
        header(PING, length=1),
        header(PONG, length=2**64 - 1),
        header(MESSAGE)[:-1] + b"\0",
        header(MESSAGE, magic=1),
    ],
    ids=[
        "no-data",
        "long-data",
        "endless-data",
        "long-message",
        "join",
        "preface",
        "join-answer",
        "taken",
        "ended",
        "ping-with-payload",
        "pong-with-payload",
        "bad-checksum",
        "bad-magic",
    ],
)
def test_an_authorized_peer_that_breaks_the_protocol_is_closed(listener: Listener, frame: bytes) -> None:
    with listener.stranger(header(PREFACE)) as stranger:
        listener.backend.authorize(listener.accepted())
        stranger.sendall(frame)
        assert hangs_up(stranger)
        assert listener.closed().status == Status.PROTOCOL_ERROR
    listener.serves()


def test_an_authorized_peer_writes_only_into_its_window(listener: Listener) -> None:
    target = np.zeros(3 * 4096, np.uint8)
    listener.backend.register_memory(address_of(target), target.nbytes)
    payload = b"\xff" * 4096
    with listener.stranger(header(PREFACE)) as stranger:
        connection = listener.accepted()
        listener.backend.authorize(connection)
        for offset, length in ((1, 4096), (4096, 1), (2**64 - 1, 2), (2**64 - 4096, 4096), (0, 4097)):
            inside = address_of(target) + 4096
            window = listener.backend.open_window(connection, table([(inside, 4096)]), 7)
            data = (payload * 2)[:length]
            stranger.sendall(header(DATA, flags=1, length=length, window=window, offset=offset, generation=7))
            stranger.sendall(data + trailer(crc32c(data), 7))
            failed = listener.inbox.next(EventKind.WINDOW_FAILED, window)
            assert failed.status == Status.OUT_OF_BOUNDS
            listener.backend.close_window(window)
        assert not target.any()
        window = listener.backend.open_window(connection, table([(address_of(target) + 4096, 4096)]), 7)
        stranger.sendall(header(DATA, flags=1, length=4096, window=window, generation=7))
        stranger.sendall(payload + trailer(crc32c(payload), 7))
        listener.inbox.next(EventKind.WINDOW_DONE, window)
    assert target[4096:8192].all() and not target[:4096].any() and not target[8192:].any()


def test_a_slow_frame_does_not_hold_others_up(listener: Listener) -> None:
    with listener.stranger(header(PREFACE), header(MESSAGE, length=100), b"half"):
        listener.accepted()
        listener.serves()


def test_pings_are_answered_between_frames(listener: Listener) -> None:
    with listener.stranger(header(PREFACE)) as stranger:
        listener.backend.authorize(listener.accepted())
        stranger.settimeout(PATIENCE_S)
        skip_invitation(stranger)
        stranger.sendall(header(PONG) + header(PING))  # an answer that nobody asked for is nothing
        assert stranger.recv(HEADER_BYTES, socket.MSG_WAITALL) == header(PONG)
        stranger.sendall(header(PING) + header(MESSAGE, length=3) + b"hey")
        assert listener.inbox.next(EventKind.MESSAGE).payload == b"hey"
        assert stranger.recv(HEADER_BYTES, socket.MSG_WAITALL) == header(PONG)


def test_a_flood_of_pings_holds_nobody_up_and_is_not_kept(listener: Listener) -> None:
    """Its answers are not read, so at some time none can leave; however many pings come meanwhile, one is owed."""
    flood, sent, over = header(PING) * 1000, [0], threading.Event()
    with listener.stranger(header(PREFACE)) as stranger:
        listener.backend.authorize(listener.accepted())
        stranger.setblocking(False)

        def pour() -> None:
            while not over.is_set():
                try:
                    sent[0] += stranger.send(flood[sent[0] % HEADER_BYTES :])
                except BlockingIOError:
                    time.sleep(0.001)

        listener.serves()
        before = resident_bytes()
        pouring = threading.Thread(target=pour)
        pouring.start()
        try:
            until = time.monotonic() + 2.0
            while time.monotonic() < until:
                listener.serves()
        finally:
            over.set()
            pouring.join()
        assert sent[0] > FLOOD_BYTES
        assert resident_bytes() - before < FLOOD_BYTES


def test_any_bytes_are_a_sign_of_life(listener: Listener) -> None:
    """A peer that answers no ping lives as long as it says something, if only parts of a message."""
    with listener.stranger(header(PREFACE)) as stranger:
        connection = listener.accepted()
        listener.backend.authorize(connection)
        listener.backend.watch(connection, 0.3)
        stranger.sendall(header(MESSAGE, length=30))
        for _ in range(30):
            stranger.sendall(b"x")
            time.sleep(0.05)
        assert listener.inbox.next(EventKind.MESSAGE).payload == b"x" * 30
        closed = listener.closed()
        assert (closed.status, closed.detail) == (Status.SILENT, "the peer is silent for 0.3 s")
        skip_invitation(stranger)
        pings = received(stranger)
        assert len(pings) >= 6 * HEADER_BYTES and pings == header(PING) * (len(pings) // HEADER_BYTES)


def test_scattered_bytes_of_a_peer_cost_bounded_memory(listener: Listener) -> None:
    """A peer that leaves a hole after every byte is refused before the book-keeping outgrows the window."""
    target = np.zeros(1 << 20, np.uint8)
    listener.backend.register_memory(address_of(target), target.nbytes)
    with listener.stranger(header(PREFACE)) as stranger:
        connection = listener.accepted()
        listener.backend.authorize(connection)
        window = listener.backend.open_window(connection, table([(address_of(target), target.nbytes)]), 1)
        frames = [
            header(DATA, length=1, window=window, offset=2 * i, generation=1) + b"\1" + trailer(0, 1)
            for i in range(9000)
        ]
        stranger.sendall(b"".join(frames))
        failed = listener.inbox.next(EventKind.WINDOW_FAILED, window)
        assert failed.status == Status.REFUSED
        assert target.sum() <= 8192


def test_more_strangers_than_allowed_are_turned_away_and_places_come_back(listener: Listener) -> None:
    strangers = [listener.stranger(header(PREFACE)) for _ in range(UNAUTHORIZED_CONNECTIONS + 8)]
    events = until(listener.backend, lambda all: len(all) >= UNAUTHORIZED_CONNECTIONS)
    events += settle(listener.backend)
    assert len(of_kind(events, EventKind.ACCEPTED)) == UNAUTHORIZED_CONNECTIONS
    for stranger in strangers[UNAUTHORIZED_CONNECTIONS:]:
        assert hangs_up(stranger)
    for stranger in strangers:
        stranger.close()
    until(listener.backend, lambda all: len(of_kind(all, EventKind.CLOSED)) == UNAUTHORIZED_CONNECTIONS)
    listener.serves()


def test_strangers_that_say_nothing_lose_their_places(listener: Listener) -> None:
    strangers = [listener.stranger() for _ in range(UNAUTHORIZED_CONNECTIONS)]
    for stranger in strangers:
        assert hangs_up(stranger)
        stranger.close()
    assert listener.quiet(0.05)
    listener.serves()


def test_a_joining_lane_needs_the_token(listener: Listener) -> None:
    with listener.stranger(header(PREFACE)) as first:
        listener.backend.authorize(listener.accepted())
        first.settimeout(PATIENCE_S)
        invitation = first.recv(HEADER_BYTES, socket.MSG_WAITALL)
        assert invitation[4] == JOIN
        token = invitation[40:56]
        with listener.stranger(joining(bytes(reversed(token)))) as wrong:
            assert hangs_up(wrong)
        with listener.stranger(joining(token)) as right:
            time.sleep(0.1)
            with listener.stranger(joining(token)) as again:
                assert hangs_up(again)
            right.sendall(header(MESSAGE, length=3) + b"hey")
            assert listener.inbox.next(EventKind.MESSAGE).payload == b"hey"
    assert listener.closed().status == Status.CONNECTION_LOST


# -- the connecting side


def test_a_lane_that_is_refused_ends_alone(listener: Listener) -> None:
    """The acceptor has no room for it: strangers hold all that may be without a preface."""
    client = TcpBackend(lanes=2)
    here = client.connect(listener.address, 5.0)
    until_event(client, EventKind.CONNECTED)
    there = listener.accepted()
    listener.backend.authorize(there)
    strangers = [listener.stranger() for _ in range(UNAUTHORIZED_CONNECTIONS)]
    time.sleep(0.1)
    client.authorize(here)
    time.sleep(0.2)  # it dials the other lane, which is closed at once
    for number in range(3):
        client.send(here, b"hey %d" % number)
        assert listener.inbox.next(EventKind.MESSAGE).payload == b"hey %d" % number
        time.sleep(0.1)
    assert client.connection_info(here).lanes == 1
    listener.carries(client, here, there)
    for stranger in strangers:
        stranger.close()
    client.close()


def test_a_lane_carries_nothing_before_it_was_answered() -> None:
    """Its bytes would be lost with it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = TcpBackend(lanes=2)
        connection = client.connect(f"tcp://127.0.0.1:{server.getsockname()[1]}", 5.0)
        server.settimeout(PATIENCE_S)
        first, _ = server.accept()
        until_event(client, EventKind.CONNECTED)
        first.sendall(header(JOIN, token=b"t" * 16, offset=1))
        client.authorize(connection)
        joined, _ = server.accept()
        joined.settimeout(PATIENCE_S)
        assert joined.recv(HEADER_BYTES + TAG_BYTES, socket.MSG_WAITALL)[4] == PREFACE
        source = random_bytes(64 << 20)  # more than the first lane takes
        client.register_memory(address_of(source), source.nbytes)
        window = struct.pack("<QQQ", 1, 1, source.nbytes)
        client.post(connection, window, table([(address_of(source), 0, source.nbytes)]), 1)
        joined.settimeout(0.3)
        with pytest.raises(TimeoutError):
            joined.recv(1)
        joined.sendall(header(PONG))
        joined.settimeout(PATIENCE_S)
        assert joined.recv(HEADER_BYTES, socket.MSG_WAITALL)[4] == DATA
        client.close()
        for each in (first, joined):
            each.close()


def test_an_acceptor_can_not_make_us_open_sockets_before_we_trust_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = TcpBackend(lanes=4)
        connection = client.connect(f"tcp://127.0.0.1:{server.getsockname()[1]}", 5.0)
        server.settimeout(PATIENCE_S)
        first, _ = server.accept()
        until_event(client, EventKind.CONNECTED)
        first.sendall(header(JOIN, token=b"t" * 16, offset=1000) * 50)
        server.settimeout(0.3)
        with pytest.raises(TimeoutError):
            server.accept()
        client.authorize(connection)
        joined = [server.accept()[0] for _ in range(3)]
        with pytest.raises(TimeoutError):
            server.accept()
        client.close()
        for each in (first, *joined):
            each.close()


def test_connect_to_nobody_ends_closed_or_raises() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    client = TcpBackend()
    try:
        client.connect(f"tcp://127.0.0.1:{port}", 5.0)
    except OSError:
        assert settle(client, 0.05) == []
    else:
        assert until_event(client, EventKind.CLOSED).status == Status.IO_ERROR
    client.close()


def test_connect_without_an_answer_ends_at_its_timeout() -> None:
    """A listener whose queue is full drops what else comes, as a dead host would."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        fillers = []
        for _ in range(3):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(server.getsockname())
            fillers.append(filler)
        time.sleep(0.05)
        client = TcpBackend()
        begun = time.monotonic()
        connection = client.connect(f"tcp://127.0.0.1:{server.getsockname()[1]}", 0.3)
        closed = until_event(client, EventKind.CLOSED)
        assert (closed.connection, closed.status) == (connection, Status.IO_ERROR)
        assert 0.25 < time.monotonic() - begun < 2.0
        client.close()
        for filler in fillers:
            filler.close()


def test_addresses() -> None:
    backend = TcpBackend()
    for bad in (
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:",
        "tcp://127.0.0.1:x",
        "tcp://127.0.0.1:70000",
        "tcp://127.0.0.1:-1",
    ):
        with pytest.raises(ValueError, match="address"):
            backend.listen(bad)
        with pytest.raises(ValueError, match="address"):
            backend.connect(bad, 1.0)
    taken = backend.listen("tcp://127.0.0.1:0")
    with pytest.raises(OSError, match="can't listen"):
        TcpBackend().listen(taken)
    backend.close()


@pytest.mark.usefixtures("collected")
def test_ipv6_and_a_chosen_local_address() -> None:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError:
        pytest.skip("no IPv6 loopback here")
    server = TcpBackend()
    address = server.listen("tcp://[::1]:0")
    assert address.startswith("tcp://[::1]:")
    for local in ("", "::1"):
        client = TcpBackend(local_address=local)
        client.connect(address, 5.0)
        until_event(client, EventKind.CONNECTED)
        until_event(server, EventKind.ACCEPTED)
        client.close()
        until_event(server, EventKind.CLOSED)
    before = len(os.listdir("/proc/self/fd"))
    for local, error in (("127.0.0.1", OSError), ("not an address", ValueError)):
        client = TcpBackend(local_address=local)
        with pytest.raises(error):
            client.connect(address, 5.0)
        client.close()
    assert len(os.listdir("/proc/self/fd")) == before
    server.close()
