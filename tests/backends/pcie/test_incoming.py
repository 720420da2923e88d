# SPDX-License-Identifier: Apache-2.0
"""The receiver's half while one thread polls and another opens and closes windows."""

from __future__ import annotations

import threading
from itertools import count
from typing import Any, cast

import numpy as np

from sage_kv_connector.backends.base import Status
from sage_kv_connector.backends.pcie import messages as pm
from sage_kv_connector.backends.pcie.incoming import Incoming
from sage_kv_connector.backends.pcie.ipc_memory import IpcMemory
from sage_kv_connector.devices.runtime import Copies, CopyKind

CONNECTION, SIZE, SOURCE, TARGET = 1, 4096, 1 << 30, 1 << 31


class Runtime:
    """Remembers when it copied."""

    def __init__(self) -> None:
        self.copied: list[str] = []
        self.now = "open"

    def stream_create(self, device: int) -> int:
        return 1

    event_create = stream_create

    def copy_batch_async(self, device: int, copies: Copies, kind: CopyKind, stream: int) -> None:
        self.copied.append(self.now)

    def nothing(self, *arguments: int) -> None:
        pass

    event_record = event_synchronize = event_destroy = stream_destroy = nothing


class SlowMemory:
    """Opening a peer's allocation takes until ``go``."""

    device = 0

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.opening, self.go = threading.Event(), threading.Event()

    def opened(self, connection: int, handles: tuple[bytes, ...]) -> list[int]:
        self.opening.set()
        assert self.go.wait(10)
        return [SOURCE]


def test_nothing_is_copied_into_a_window_that_was_closed_while_an_offer_came() -> None:
    runtime, told = Runtime(), list[Any]()
    memory = SlowMemory(runtime)
    incoming = Incoming(
        cast(IpcMemory, memory),
        count(1),
        lambda *event: None,
        lambda _, message: told.append(message),
        lambda: None,
    )
    segments = np.array([[TARGET, SIZE]], dtype=np.uint64)
    window = incoming.open_window(CONNECTION, segments, 7)
    rows = np.array([[0, 0, 0, SIZE]], dtype="<u8").tobytes()
    offer = pm.Offered(3, 0, window, 7, (b"h",), (SIZE,), rows)
    polls = threading.Thread(target=incoming.on_offered, args=(CONNECTION, offer))
    polls.start()
    assert memory.opening.wait(10)

    def close() -> None:
        assert incoming.close_window(window) == 0
        runtime.now = "closed"

    closes = threading.Thread(target=close)
    closes.start()
    closes.join(0.1)  # it may wait for the offer
    memory.go.set()
    polls.join(10)
    closes.join(10)
    incoming.close()
    assert "closed" not in runtime.copied
    assert [(m.post, m.status) for m in told] == [(3, Status.CANCELLED)]
