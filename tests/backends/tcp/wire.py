# SPDX-License-Identifier: Apache-2.0
"""Frames of the tcp backend as a stranger would write them, and a proxy that changes bytes."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable

from sage_kv_connector._data_plane import crc32c

MAGIC = 0x54564B53
PREFACE, MESSAGE, DATA, JOIN, PING, PONG = 1, 2, 3, 4, 5, 6
TAKEN, ENDED = 9, 10
HEADER_BYTES, TAG_BYTES = 64, 16


def header(
    kind: int,
    *,
    magic: int = MAGIC,
    flags: int = 0,
    length: int = 0,
    window: int = 0,
    offset: int = 0,
    generation: int = 0,
    token: bytes = bytes(16),
) -> bytes:
    """One frame header with its checksum."""
    start = struct.pack("<IBBHQQQQ16sI", magic, kind, flags, 0, length, window, offset, generation, token, 0)
    return start + struct.pack("<I", crc32c(start))


def joining(token: bytes, number: int = 1, tag: bytes = bytes(16)) -> bytes:
    """What a lane that joins begins with."""
    return header(PREFACE, token=token, offset=number) + tag


def written(address: tuple[str, int], family: int = 4) -> bytes:
    """An IPv4 address as endpoints tell it to each other."""
    host, port = address
    return struct.pack("<H", family) + struct.pack(">HI4s12x", port, 0, socket.inet_aton(host))


def trailer(crc: int, generation: int, *, aborted: int = 0) -> bytes:
    return struct.pack("<IIQ", crc, aborted, generation)


def parse_address(address: str) -> tuple[str, int]:
    host, _, port = address.partition("://")[2].rpartition(":")
    return host, int(port)


class Proxy:
    """Passes every connection on to ``target``; ``change(position, data)`` rewrites what goes there, ``change_back``
    what comes from there.

    ``position`` counts the bytes of one connection in that direction. Each connection and direction has a thread.
    """

    def __init__(
        self,
        target: str,
        change: Callable[[int, bytes], bytes],
        change_back: Callable[[int, bytes], bytes] = lambda position, data: data,
    ) -> None:
        self._target = parse_address(target)
        self._change, self._change_back = change, change_back
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets = [self._listener]
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._sockets += [near, far]
                for thread in (
                    threading.Thread(target=self._pump, args=(near, far, self._change)),
                    threading.Thread(target=self._pump, args=(far, near, self._change_back)),
                ):
                    self._threads.append(thread)
                    thread.start()

    def _pump(
        self, source: socket.socket, sink: socket.socket, change: Callable[[int, bytes], bytes]
    ) -> None:
        position = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(change(position, data))
                position += len(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join(5.0)
