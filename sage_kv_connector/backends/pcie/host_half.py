# SPDX-License-Identifier: Apache-2.0
"""What pcie leaves to shm as it is: host memory, and most of what is about connections."""

from __future__ import annotations

from collections.abc import Sequence

from sage_kv_connector import _data_plane
from sage_kv_connector.backends.converting_backend import Ring
from sage_kv_connector.backends.shm.backend import ShmBackend

#: Begins the descriptor of a window in host memory.
HOST = b"H"


class HostHalf:
    def __init__(self, inner: ShmBackend) -> None:
        self._inner = inner

    def register_memory(self, address: int, length: int) -> int:
        return self._inner.register_memory(address, length)

    def deregister_memory(self, region: int) -> None:
        self._inner.deregister_memory(region)

    def small_posts(self) -> Sequence[tuple[int, int]]:
        return self._inner.small_posts()

    def authorize(self, connection: int) -> None:
        self._inner.authorize(connection)

    def watch(self, connection: int, timeout_s: float) -> None:
        self._inner.watch(connection, timeout_s)

    def unwatch(self, connection: int) -> None:
        self._inner.unwatch(connection)

    def close_connection(self, connection: int) -> None:
        self._inner.close_connection(connection)

    def open_part_window(
        self, connection: int, decoder: _data_plane.PartDecoder, ring: Ring, generation: int
    ) -> int:
        return self._inner.open_part_window(connection, decoder, ring, generation)

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
        if window_descriptor[:1] != HOST:
            raise ValueError("window_descriptor is none of host memory, where converted KV goes")
        return self._inner.post_parts(
            connection, window_descriptor[1:], encoder, ring, generation, priority=priority, checksum=checksum
        )
