# SPDX-License-Identifier: Apache-2.0
"""How long a page takes from "this is final" to its place in decode's cache, with all lanes asleep before.

Two moments: a layer ends (the engine's thread goes on with the next one), and a step ends (nothing is left to compute).
"""

from __future__ import annotations

import select
import time
from statistics import median
from typing import Any

import numpy as np

from sage_kv_connector import _data_plane
from sage_kv_connector.backends import create_backend, loopback_address
from sage_kv_connector.backends.base import Backend, Event, EventKind
from sage_kv_connector.backends.native import NativeBackend

PAGE_BYTES = 4096
#: Longer than lanes spin after they had work.
REST_S = 0.002
TIMEOUT_S = 10.0


def first_byte_us(name: str, repeats: int) -> dict[str, Any]:
    """Medians and 99th percentiles in microseconds over one page of 4 KiB, as its lane stamped its arrival."""
    receiver, sender = create_backend(name), create_backend(name)
    assert isinstance(receiver, NativeBackend) and isinstance(sender, NativeBackend)
    try:
        here, there = _connected(receiver, sender)
        checksum = sender.connection_info(there).crosses_wire
        memory = np.zeros((2, PAGE_BYTES), dtype=np.uint8)
        layouts = []
        for row, backend in zip(memory, (receiver, sender), strict=True):
            address = int(row.ctypes.data)
            backend.register_memory(address, PAGE_BYTES)
            plane = (address, PAGE_BYTES, PAGE_BYTES, [0])
            layouts.append(_data_plane.PageLayout([(1, [[plane]])], [(address, PAGE_BYTES)]))
        taken: dict[str, list[float]] = {"layer": [], "step": []}
        for generation in range(1, 2 * repeats + 1):
            moment = "layer" if generation % 2 else "step"
            memory[1] = generation % 251
            tables = _data_plane.PageTables([1])
            tables.append(0, np.zeros(1, dtype=np.int64))
            step = _data_plane.Step()
            step.add(tables, (1,))
            cursor = _data_plane.PagedCursor(layouts[1], tables, [(0, [(0, 1)])])
            window = receiver.open_paged_window(
                here, layouts[0], [(0, np.zeros(1, dtype=np.int64))], generation
            )
            sender.post_pages(
                there, receiver.window_descriptor(window), cursor, generation, checksum=checksum
            )
            time.sleep(REST_S)
            begun = time.monotonic_ns()
            if moment == "layer":
                step.layer(0, 0)
            else:
                step.all()
            taken[moment].append((_await(receiver, EventKind.WINDOW_DONE).time_ns - begun) / 1e3)
            receiver.close_window(window)
            _await(sender, EventKind.SENT)
            if not (memory[0] == generation % 251).all():
                raise RuntimeError("another page's bytes arrived")
    finally:
        receiver.close()
        sender.close()
    return {
        "backend": name,
        **{f"{moment}_us_p50": median(times) for moment, times in taken.items()},
        **{f"{moment}_us_p99": float(np.percentile(times, 99)) for moment, times in taken.items()},
    }


def _connected(receiver: Backend, sender: Backend) -> tuple[int, int]:
    there = sender.connect(receiver.listen(loopback_address(receiver.capabilities.name)), TIMEOUT_S)
    _await(sender, EventKind.CONNECTED)
    here = _await(receiver, EventKind.ACCEPTED).connection
    sender.authorize(there)
    receiver.authorize(here)
    return here, there


def _await(backend: Backend, kind: EventKind) -> Event:
    """Without ``Backend.wait``: this thread drives no lane, as an engine's does not."""
    until = time.monotonic() + TIMEOUT_S
    readable = select.poll()  # select() takes no descriptor above 1023
    readable.register(backend.fileno(), select.POLLIN)
    while time.monotonic() < until:
        readable.poll(TIMEOUT_S * 1000)
        for event in backend.poll():
            if event.kind == kind:
                return event
    raise RuntimeError(f"waited for {kind.name} in vain")
