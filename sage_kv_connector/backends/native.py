# SPDX-License-Identifier: Apache-2.0
"""What shm and tcp share: a Backend over an Endpoint of the C++ data plane.

The extension checks what needs its tables (regions, windows, bounds); here are the
checks of shapes and types, and the shape of what comes back.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from sage_kv_connector import _data_plane
from sage_kv_connector.backends.base import (
    Capabilities,
    ConnectionInfo,
    Descriptors,
    Event,
    Segments,
    checked_table,
)
from sage_kv_connector.backends.converting_backend import Ring

#: Spin of lanes and waiters after activity, in microseconds: longer than a wake-up, far shorter than a step.
DEFAULT_SPIN_US = 50


def default_lanes() -> int:
    """Data-plane threads of a backend: one, and a second where the engine leaves cores over."""
    return 2 if len(os.sched_getaffinity(0)) > 2 else 1


class NativeBackend:
    """Common part; a subclass makes the endpoint and names its capabilities."""

    capabilities: ClassVar[Capabilities]

    def __init__(self, endpoint: _data_plane.Endpoint) -> None:
        self._endpoint = endpoint

    def register_memory(self, address: int, length: int) -> int:
        return self._endpoint.register_memory(address, length)

    def deregister_memory(self, region: int) -> None:
        self._endpoint.deregister_memory(region)

    def listen(self, address: str) -> str:
        return f"{self.capabilities.name}://{self._endpoint.listen(self._without_scheme(address))}"

    def connect(self, address: str, timeout_s: float) -> int:
        return self._endpoint.connect(self._without_scheme(address), timeout_s)

    def authorize(self, connection: int) -> None:
        self._endpoint.authorize(connection)

    def watch(self, connection: int, timeout_s: float) -> None:
        self._endpoint.watch(connection, timeout_s)

    def unwatch(self, connection: int) -> None:
        self._endpoint.unwatch(connection)

    def connection_info(self, connection: int) -> ConnectionInfo:
        return ConnectionInfo(*self._endpoint.connection_info(connection))

    def close_connection(self, connection: int) -> None:
        self._endpoint.close_connection(connection)

    def send(self, connection: int, message: bytes) -> None:
        self._endpoint.send(connection, message)

    def open_window(
        self, connection: int, segments: Segments, generation: int, *, notify_chunks: bool = False
    ) -> int:
        return self._endpoint.open_window(
            connection, checked_table(segments, "segments", 2), generation, notify_chunks
        )

    def window_descriptor(self, window: int) -> bytes:
        return self._endpoint.window_descriptor(window)

    def close_window(self, window: int) -> int:
        return self._endpoint.close_window(window)

    def post(
        self,
        connection: int,
        window_descriptor: bytes,
        descriptors: Descriptors,
        generation: int,
        *,
        priority: int = 0,
        checksum: bool = True,
    ) -> int:
        return self._endpoint.post(
            connection,
            window_descriptor,
            checked_table(descriptors, "descriptors", 3),
            generation,
            priority,
            checksum,
        )

    def open_paged_window(
        self,
        connection: int,
        layout: _data_plane.PageLayout,
        pages: Sequence[tuple[int, npt.NDArray[np.int64]]],
        generation: int,
    ) -> int:
        return _data_plane.open_paged_window(self._endpoint, connection, layout, pages, generation)

    def post_pages(
        self,
        connection: int,
        window_descriptor: bytes,
        cursor: _data_plane.PagedCursor,
        generation: int,
        *,
        priority: int = 0,
        checksum: bool = True,
    ) -> int:
        return _data_plane.post_pages(
            self._endpoint, connection, window_descriptor, cursor, generation, priority, checksum
        )

    def open_part_window(
        self, connection: int, decoder: _data_plane.PartDecoder, ring: Ring, generation: int
    ) -> int:
        return _data_plane.open_part_window(self._endpoint, connection, decoder, *ring, generation)

    def post_parts(
        self,
        connection: int,
        window_descriptor: bytes,
        encoder: _data_plane.PartEncoder,
        ring: Ring,
        generation: int,
        *,
        priority: int = 0,
        checksum: bool = True,
    ) -> int:
        return _data_plane.post_parts(
            self._endpoint, connection, window_descriptor, encoder, *ring, generation, priority, checksum
        )

    def cancel(self, post: int) -> None:
        self._endpoint.cancel(post)

    def poll(self, max_events: int = 256) -> Sequence[Event]:
        return [Event._make(event) for event in self._endpoint.poll(max_events)]

    def wait(self, timeout_s: float) -> bool:
        return self._endpoint.wait(timeout_s)

    def fileno(self) -> int:
        return self._endpoint.fileno()

    def counters(self) -> dict[str, int]:
        return self._endpoint.counters()

    def traffic(self) -> Sequence[tuple[int, int, int]]:
        return self._endpoint.traffic()

    def small_posts(self) -> Sequence[tuple[int, int]]:
        return self._endpoint.small_posts()

    def close(self) -> None:
        self._endpoint.close()

    def _without_scheme(self, address: str) -> str:
        scheme = f"{self.capabilities.name}://"
        if not address.startswith(scheme):
            raise ValueError(f"address {address!r} must start with {scheme}")
        return address.removeprefix(scheme)
