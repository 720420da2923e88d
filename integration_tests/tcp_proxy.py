# SPDX-License-Identifier: Apache-2.0
"""A TCP proxy that can harm what passes from the server to the client."""

from __future__ import annotations

import contextlib
import socket
import threading

#: Of the kernel's, for what the target sends: what is held back here stays with the target, which does not take it
#: for delivered.
RECEIVE_BUFFER = 128 * 1024


class TcpProxy:
    """Forwards connections to ``target_port``. Counts and harms bytes that the target sends.

    ``flip_byte_at(n)`` inverts one bit of byte n from now, ``hold_at(n)`` stops to
    forward after n more bytes until ``let_go``, ``cut`` closes every connection, ``forget`` swallows all that comes
    over the connections of now, as a firewall that knows them no more. ``port``: to listen on, 0 for any.
    """

    def __init__(self, target_port: int, port: int = 0) -> None:
        self.target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = int(self._listener.getsockname()[1])
        self._lock = threading.Lock()
        self._passed = 0
        self._flip: int | None = None
        self._hold: int | None = None
        self._go = threading.Event()
        self._go.set()
        self.held = threading.Event()
        self._open: set[socket.socket] = set()
        self._forgotten: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def flip_byte_at(self, after: int) -> None:
        with self._lock:
            self._flip = self._passed + after

    @property
    def passed(self) -> int:
        """Bytes that came from the target so far."""
        return self._passed

    @property
    def flipped(self) -> bool:
        return self._flip is None

    def hold_at(self, after: int) -> None:
        with self._lock:
            self._hold = self._passed + after
            self.held.clear()
            self._go.clear()

    def let_go(self) -> None:
        self._hold = None
        self._go.set()

    def cut(self) -> None:
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self.let_go()  # now: what was held must not pass

    def forget(self) -> None:
        self._forgotten |= self._open

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket()
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            try:
                server.connect(("127.0.0.1", self.target_port))
            except OSError:
                server.close()
                client.close()
                continue
            self._open |= {client, server}
            for pair in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._forward, args=pair, daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, harmed: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if source not in self._forgotten:
                    target.sendall(self._harm(data) if harmed else data)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
            self._open.discard(sock)
            self._forgotten.discard(sock)

    def _harm(self, data: bytes) -> bytes:
        with self._lock:
            start, self._passed = self._passed, self._passed + len(data)
            if self._flip is not None and start <= self._flip < self._passed:
                changed = bytearray(data)
                changed[self._flip - start] ^= 0x10
                data, self._flip = bytes(changed), None
            hold = self._hold is not None and self._passed > self._hold
        if hold:
            self.held.set()
            self._go.wait(60)
        return data
