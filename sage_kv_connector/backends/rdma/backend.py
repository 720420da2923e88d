# SPDX-License-Identifier: Apache-2.0
"""RoCE, InfiniBand, iWARP: the receiver's card reads from the sender's pages. Sockets carry messages, and the rest.

A connection is one of tcp, with *paths* beside its sockets, one from each card of this machine. While there is a path,
chunks go over paths. What was under way over one that breaks goes another way: over the next path, else over
the sockets.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import ClassVar

from sage_kv_connector import _data_plane
from sage_kv_connector.backends.base import Capabilities
from sage_kv_connector.backends.native import DEFAULT_SPIN_US, NativeBackend
from sage_kv_connector.backends.tcp.backend import TcpBackend

logger = logging.getLogger(__name__)

DEFAULT_CHUNK_BYTES = 1 << 20


class RdmaBackend(TcpBackend):
    """Addresses are ``rdma://HOST:PORT``, as of tcp; where the cards are is found out over the connection. What is
    protected goes over the sockets, as of tcp.

    Raises OSError without an RDMA device, RuntimeError without rdma-core.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "rdma", rank=25, crosses_nodes=True, pages=True, parts=True, protects=True, mode_changes=True
    )
    default_chunk_bytes: ClassVar[int] = DEFAULT_CHUNK_BYTES
    _endpoint: _data_plane.RdmaEndpoint

    def __init__(
        self,
        *,
        lanes: int = 1,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        spin_us: int = DEFAULT_SPIN_US,
        local_address: str = "",
        measures: bool = True,
    ) -> None:
        if why := self.lacks():
            raise OSError(f"backend rdma can't be used here: {why}")
        self._says_unregistered = True
        NativeBackend.__init__(  # over an endpoint of its own
            self,
            _data_plane.RdmaEndpoint(
                lanes=lanes,
                chunk_bytes=chunk_bytes,
                spin_us=spin_us,
                local_address=local_address,
                measures=measures,
            ),
        )

    def register_memory(self, address: int, length: int) -> int:
        region = super().register_memory(address, length)
        if self._says_unregistered and (why := self._endpoint.unregistered()):
            self._says_unregistered = False
            logger.warning("%s; what lies there goes over sockets", why)
        return region

    @staticmethod
    @cache
    def lacks() -> str:
        """Why this machine can't have it, "" if it can."""
        return _data_plane.rdma_lacks()
