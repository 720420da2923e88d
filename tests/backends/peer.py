# SPDX-License-Identifier: Apache-2.0
"""A backend in a process of its own, which tests order about with messages and signals.

It prints its address and then serves one connection. Orders, as JSON: ``{"open": bytes}``
answers with a window's descriptor, ``{"post": bytes, "descriptor": hex, "fill": byte}`` posts
so many bytes of that value, ``{"busy": seconds}`` lets no Python run for so long and answers then. Each end of a
window or post is told as ``{"ended": kind, "status": status}``.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np

from sage_kv_connector.backends.base import Event, EventKind
from tests.backends.kinds import KINDS, Kind
from tests.backends.pair import PATIENCE_S, is_set_up, of_kind, table, until, until_event
from tests.backends.places import Places

GENERATION = 1
#: The last message of a side that is not protected, and the first one of the other that is.
PROTECTED = b"protected"


def hold_interpreter(seconds: float) -> None:
    """No Python of this process runs meanwhile, as beside a long call into a library that keeps the interpreter."""
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def serve(kind: Kind) -> None:
    backend = kind.make()
    print(backend.listen(kind.listen_on), flush=True)
    places = Places(kind.memory)

    def answer(connection: int, message: dict[str, Any]) -> None:
        backend.send(connection, json.dumps(message).encode())

    def obey(connection: int, order: dict[str, Any]) -> None:
        if "busy" in order:
            hold_interpreter(order["busy"])
            answer(connection, order)
            return
        size = order.get("open") or order["post"]
        memory = np.full(size, order.get("fill", 0), np.uint8)
        address = places.register(backend, memory)
        if "open" in order:
            window = backend.open_window(connection, table([(address, size)]), GENERATION)
            answer(connection, {"descriptor": backend.window_descriptor(window).hex()})
        else:
            rows = table([(address, 0, size)])
            backend.post(connection, bytes.fromhex(order["descriptor"]), rows, GENERATION)

    while True:
        if not backend.wait(5.0) and os.getppid() == 1:
            return
        for event in backend.poll():
            if event.kind == EventKind.ACCEPTED:
                if kind.encrypts is None:
                    backend.authorize(event.connection)
            elif event.kind == EventKind.CLOSED:
                return
            elif event.kind == EventKind.MESSAGE and event.payload == PROTECTED:
                kind.protect(backend, event.connection, connects=False)
                backend.authorize(event.connection)
                backend.send(event.connection, PROTECTED)
            elif event.kind == EventKind.MESSAGE:
                obey(event.connection, json.loads(event.payload))
            elif event.kind in (EventKind.SENT, EventKind.WINDOW_DONE, EventKind.WINDOW_FAILED):
                answer(event.connection, {"ended": event.kind, "status": event.status})


def spawn(kind: Kind) -> tuple[subprocess.Popen[str], str]:
    """A serving process and the address that it listens on."""
    command = [sys.executable, "-m", "tests.backends.peer", kind.name]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def stop(process: subprocess.Popen[str]) -> None:
    """SIGSTOP, waited for: kill() returns before threads on other cores have stopped."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


class Peer:
    """The other process, connected to a backend of this one."""

    def __init__(self, kind: Kind, **options: Any) -> None:
        self.process, address = spawn(kind)
        self.backend = kind.make(**options)
        self.connection = self.backend.connect(address, 5.0)
        until_event(self.backend, EventKind.CONNECTED)
        if kind.encrypts is not None:
            kind.protect(self.backend, self.connection, connects=True, last_plain=PROTECTED)
            assert until_event(self.backend, EventKind.MESSAGE).payload == PROTECTED
        self.backend.authorize(self.connection)
        deadline = time.monotonic() + PATIENCE_S
        while not is_set_up(kind, self.backend, self.connection) and time.monotonic() < deadline:
            time.sleep(0.001)
        self.places = Places(kind.memory)

    def order(self, **order: Any) -> None:
        self.backend.send(self.connection, json.dumps(order).encode())

    def open(self, size: int) -> bytes:
        """A window of ``size`` bytes over there; returns its descriptor."""
        self.order(open=size)
        return bytes.fromhex(json.loads(until_event(self.backend, EventKind.MESSAGE).payload)["descriptor"])

    def post(self, descriptor: bytes, size: int, fill: int = 1, **options: Any) -> int:
        memory = np.full(size, fill, np.uint8)
        rows = table([(self.places.register(self.backend, memory), 0, size)])
        return self.backend.post(self.connection, descriptor, rows, GENERATION, **options)

    def window(self, size: int, **options: Any) -> tuple[int, bytes, Any]:
        """A window of ``size`` bytes here; returns (window, descriptor, memory)."""
        memory = np.zeros(size, np.uint8)
        rows = table([(self.places.register(self.backend, memory), size)])
        window = self.backend.open_window(self.connection, rows, GENERATION, **options)
        return window, self.backend.window_descriptor(window), memory

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def until_closed(self, timeout_s: float) -> list[Event]:
        return until(self.backend, lambda events: bool(of_kind(events, EventKind.CLOSED)), timeout_s)

    def close(self) -> None:
        end(self.process)
        self.backend.close()
        self.places.free()


if __name__ == "__main__":
    serve(next(kind for kind in KINDS if kind.name == sys.argv[1]))
