# SPDX-License-Identifier: Apache-2.0
"""A backend over an installed transfer library, which reads the bytes of chunks from the sender's pages.

A connection is one of tcp, with a path beside its sockets: a sender's notices of chunks go over the sockets, the
receiver has its library read them into a slot, sums them up and copies them into the window. What the library can't
read, and what comes while it can't, goes over the sockets. So all that is above a backend is as of tcp: messages,
signs of life, pages, conversion on the way, checks.
"""

from __future__ import annotations

import logging
import threading
from typing import ClassVar, Self

from sage_kv_connector import _data_plane
from sage_kv_connector.backends import lacks
from sage_kv_connector.backends.base import BackendOptions
from sage_kv_connector.backends.carried.library import (
    Library,
    LibraryClass,
    LibraryError,
    LibrarySettings,
    rdma_devices,
)
from sage_kv_connector.backends.carried.reader import Reader
from sage_kv_connector.backends.native import DEFAULT_SPIN_US, NativeBackend, default_lanes
from sage_kv_connector.backends.tcp.backend import TcpBackend

logger = logging.getLogger(__name__)

#: A library's cost a read is high: longer chunks than those of our own lanes.
DEFAULT_CHUNK_BYTES = 2 << 20
SLOTS = 8


class CarriedBackend(TcpBackend):
    """A subclass names its capabilities and its library. What is protected goes over the sockets, as of tcp.

    Raises OSError where the library is not installed or does not start.
    """

    library_class: ClassVar[LibraryClass]
    default_chunk_bytes: ClassVar[int] = DEFAULT_CHUNK_BYTES
    _endpoint: _data_plane.CarriedEndpoint

    def __init__(
        self,
        *,
        lanes: int = 1,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        spin_us: int = DEFAULT_SPIN_US,
        local_address: str = "",
        measures: bool = True,
        slots: int = SLOTS,
        reached_at: str = "",
        transport: str = "",
        device: str = "",
    ) -> None:
        name = self.capabilities.name
        if why := self.lacks():
            raise OSError(f"backend {name} can't be used here: {why}")
        NativeBackend.__init__(  # over an endpoint of its own
            self,
            _data_plane.CarriedEndpoint(
                name=name,
                lanes=lanes,
                chunk_bytes=chunk_bytes,
                spin_us=spin_us,
                local_address=local_address,
                measures=measures,
                slots=slots,
            ),
        )
        self._lock = threading.Lock()
        self._carried: dict[int, tuple[int, int]] = {}
        self._says_unregistered = True
        try:
            self._library = self.library_class(
                LibrarySettings(reached_at or local_address, transport, device)
            )
            self._library.register(*self._endpoint.slots())
            self._endpoint.describe_library(self._library.description())
        except LibraryError as error:
            self._endpoint.close()
            raise OSError(f"backend {name} can't be used here: {error}") from error
        self._reader: Reader | None = Reader(self._endpoint, self._library, self._lock, name)

    @classmethod
    def from_options(cls, options: BackendOptions) -> Self:
        return cls(
            lanes=options.lanes or default_lanes(),
            chunk_bytes=options.chunk_bytes or cls.default_chunk_bytes,
            local_address=options.local_address,
            measures=options.measures,
            reached_at=options.reached_at,
            transport=options.library_transport,
            device=options.library_device,
        )

    @classmethod
    def lacks(cls) -> str:
        """Why this machine can't have it, "" if it can."""
        return cls.library_class.lacks()

    @staticmethod
    def unsuited() -> str:
        """Why ``backend=auto`` leaves it out: a library that has sockets alone is slower than tcp."""
        if not rdma_devices():
            return "without an RDMA network card tcp is faster"
        return "" if lacks("rdma") else "rdma uses the cards itself"

    def register_memory(self, address: int, length: int) -> int:
        region = super().register_memory(address, length)
        try:
            with self._lock:
                self._library.register(address, length)
                description = self._library.description()
        except LibraryError as error:
            if self._says_unregistered:
                self._says_unregistered = False
                name = self.capabilities.name
                logger.warning("%s does not take memory: %s; what lies there goes over sockets", name, error)
            return region
        # Peers know of it before they are told to read there.
        self._endpoint.describe_library(description)
        self._carried[region] = (address, length)
        self._endpoint.carry(region, address, length)
        return region

    def deregister_memory(self, region: int) -> None:
        super().deregister_memory(region)
        if (known := self._carried.pop(region, None)) is not None:
            with self._lock:
                self._library.deregister(*known)

    def counters(self) -> dict[str, int]:
        failures = self._reader.failures if self._reader is not None else 0
        return super().counters() | {"reads_failed": failures}

    def close(self) -> None:
        super().close()
        reader, self._reader = self._reader, None
        if reader is None:
            return
        if reader.close():
            self._library.close()
        else:
            # It still writes: what it writes to, and itself, stay until the process ends.
            logger.warning("%s did not end its reads in time", self.capabilities.name)
            self._endpoint.abandon_slots()
            _abandoned.append(self._library)


_abandoned: list[Library] = []
