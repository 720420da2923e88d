# SPDX-License-Identifier: Apache-2.0
"""Same node: the receiver reads straight from the sender's pages, or through an arena where it may not."""

from __future__ import annotations

from typing import ClassVar, Self

from sage_kv_connector import _data_plane
from sage_kv_connector.backends.base import BackendOptions, Capabilities
from sage_kv_connector.backends.native import DEFAULT_SPIN_US, NativeBackend

#: 512 pages of 4 KiB, as many as one copy call takes; larger chunks gain nothing measurable.
DEFAULT_CHUNK_BYTES = 2 << 20
DEFAULT_ARENA_BYTES = 32 << 20


class ShmBackend(NativeBackend):
    """Addresses are ``shm://NAME``; ``listen("shm://")`` chooses an unguessable name."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        "shm", rank=20, crosses_nodes=False, pages=True, parts=True
    )

    def __init__(
        self,
        *,
        lanes: int = 1,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        spin_us: int = DEFAULT_SPIN_US,
        allow_direct: bool = True,
        arena_bytes: int = DEFAULT_ARENA_BYTES,
        measures: bool = True,
    ) -> None:
        super().__init__(
            _data_plane.ShmEndpoint(
                lanes=lanes,
                chunk_bytes=chunk_bytes,
                spin_us=spin_us,
                allow_direct=allow_direct,
                arena_bytes=arena_bytes,
                measures=measures,
            )
        )

    @classmethod
    def from_options(cls, options: BackendOptions) -> Self:
        return cls(
            lanes=options.lanes or 1,
            chunk_bytes=options.chunk_bytes or DEFAULT_CHUNK_BYTES,
            allow_direct=options.direct,
            measures=options.measures,
        )
