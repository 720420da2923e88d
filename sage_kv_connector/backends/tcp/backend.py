# SPDX-License-Identifier: Apache-2.0
"""Any two machines: gather and scatter on sockets, straight from and to pages; a CRC32C or a tag on every chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

from sage_kv_connector import _data_plane
from sage_kv_connector.backends.base import BackendOptions, Capabilities
from sage_kv_connector.backends.native import DEFAULT_SPIN_US, NativeBackend, default_lanes
from sage_kv_connector.backends.protecting_backend import TrafficKeys

#: Stays in the L2 cache between its CRC and its send.
DEFAULT_CHUNK_BYTES = 512 << 10


class TcpBackend(NativeBackend):
    """Addresses are ``tcp://HOST:PORT`` or ``tcp://[V6]:PORT``; port 0 takes any free one."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        "tcp", rank=30, crosses_nodes=True, pages=True, parts=True, protects=True
    )
    default_chunk_bytes: ClassVar[int] = DEFAULT_CHUNK_BYTES
    _endpoint: _data_plane.TcpEndpoint

    def __init__(
        self,
        *,
        lanes: int = 1,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        spin_us: int = DEFAULT_SPIN_US,
        socket_buffer: int = 0,
        local_address: str = "",
        links: Sequence[str] = (),
        measures: bool = True,
    ) -> None:
        super().__init__(
            _data_plane.TcpEndpoint(
                lanes=lanes,
                chunk_bytes=chunk_bytes,
                spin_us=spin_us,
                socket_buffer=socket_buffer,
                local_address=local_address,
                links=list(links),
                measures=measures,
            )
        )

    @classmethod
    def from_options(cls, options: BackendOptions) -> Self:
        return cls(
            lanes=options.lanes or default_lanes(),
            chunk_bytes=options.chunk_bytes or cls.default_chunk_bytes,
            local_address=options.local_address,
            links=options.links,
            measures=options.measures,
        )

    def protection_lacks(self) -> str:
        return _data_plane.libcrypto()[1]

    def protect(self, connection: int, keys: TrafficKeys, last_plain: bytes = b"") -> None:
        self._endpoint.protect(connection, *keys, last_plain)
