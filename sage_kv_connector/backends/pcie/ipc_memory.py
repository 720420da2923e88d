# SPDX-License-Identifier: Apache-2.0
"""One device's memory as other processes reach it: exported allocations, opened handles of peers."""

from __future__ import annotations

import logging

import numpy as np

from sage_kv_connector.backends.base import Descriptors, Segments
from sage_kv_connector.backends.pcie.messages import table_of
from sage_kv_connector.devices.runtime import DeviceError, DeviceMemory

logger = logging.getLogger(__name__)

PROBE_BYTES = 4096


class IpcMemory:
    """Registered spans, what they were exported as, and what peers' connections opened here."""

    def __init__(self, device: DeviceMemory) -> None:
        self.runtime, self.device = device.runtime, device.number
        self.vendor = device.runtime.vendor
        self.process = device.runtime.ipc_process_id(device.number)
        self._spans = np.zeros((0, 4), dtype=np.uint64)  # address, end, base, length of its allocation
        self._handles: dict[tuple[int, int], bytes] = {}
        self._opened: dict[int, dict[bytes, int]] = {}
        self._probe = 0
        self._unopened: DeviceError | None = None  #: why registered memory has no handle

    def register(self, address: int, length: int) -> None:
        """The range may span neighbouring allocations: each has a handle of its own, if any.

        Virtual memory (an engine's sleep mode, expandable segments) has none, though the runtime exports its other
        memory; some runtimes don't tell where another's allocation begins. Then no peer's probe opens, so that it
        goes on to another way.
        """
        rows, end = [], address + length
        while address < end:
            try:
                base, size = self._allocation_of(address, end - address)
                self._handle(base, size, self.process)
            except DeviceError as error:
                if self._unopened is None:
                    logger.warning(
                        "KV is staged in host memory for peers of this node, they can't open it: %s", error
                    )
                self._unopened = error
                base, size = address, end - address
            stop = min(end, base + size)
            rows.append((address, stop, base, size))
            address = stop
        spans = np.concatenate([self._spans, np.array(rows, dtype=np.uint64).reshape(-1, 4)])
        self._spans = spans[np.argsort(spans[:, 0])]

    def covers(self, segments: Segments) -> bool:
        """Whether all segments lie in registered memory of the device."""
        return len(segments) > 0 and bool((self._span_of(segments[:, 0], segments[:, 1]) >= 0).all())

    def export(
        self, descriptors: Descriptors, process: int
    ) -> tuple[tuple[bytes, ...], tuple[int, ...], bytes]:
        """Handles and lengths of the allocations that ``descriptors`` lie in, and the table that names them.

        Raises ValueError for memory that is not registered, DeviceError when it can't be exported.
        """
        spans = self._span_of(descriptors[:, 0], descriptors[:, 2])
        if (spans < 0).any():
            address, _, length = descriptors[int(np.flatnonzero(spans < 0)[0])].tolist()
            raise ValueError(f"descriptor [{address:#x}, +{length}) of the device is not registered memory")
        used, index = np.unique(self._spans[spans][:, 2:], axis=0, return_inverse=True)
        handles = tuple(self._handle(int(base), int(size), process) for base, size in used)
        table = table_of(used, descriptors, index.reshape(-1).tolist())
        return handles, tuple(int(size) for size in used[:, 1]), table

    def opened(self, connection: int, handles: tuple[bytes, ...]) -> list[int]:
        """Bases of a peer's allocations in this process. Raises DeviceError, ValueError for a bad handle."""
        known = self._opened.setdefault(connection, {})
        for handle in handles:
            if handle not in known:
                known[handle] = self.runtime.ipc_import(self.device, handle)
        return [known[handle] for handle in handles]

    def forget(self, connection: int) -> None:
        """Close what a connection opened. No copy from it may be under way."""
        for base in self._opened.pop(connection, {}).values():
            self.runtime.ipc_close(self.device, base)

    def probe(self, process: int) -> bytes:
        """A handle of a small allocation that the other side tries to open.

        Raises DeviceError, also where registered memory has no handle: then the other side is to read nothing here.
        """
        if self._unopened is not None:
            raise self._unopened
        if not self._probe:
            self._probe = self.runtime.alloc(self.device, PROBE_BYTES)
        return self._handle(self._probe, PROBE_BYTES, process)

    def try_probe(self, handle: bytes) -> None:
        """Raises DeviceError or ValueError when a peer's memory can't be opened here."""
        self.runtime.ipc_close(self.device, self.runtime.ipc_import(self.device, handle))

    def close(self) -> None:
        for connection in list(self._opened):
            self.forget(connection)
        if self._probe:
            self.runtime.free(self.device, self._probe)
            self._probe = 0

    def _allocation_of(self, address: int, length: int) -> tuple[int, int]:
        """The one that holds the range, or its beginning."""
        try:
            return self.runtime.allocation_of(self.device, address, length)
        except ValueError:
            return self.runtime.allocation_of(self.device, address, 1)

    def _handle(self, base: int, size: int, process: int) -> bytes:
        key = (base, process)
        if key not in self._handles:
            self._handles[key] = self.runtime.ipc_export(self.device, base, size, process)
        return self._handles[key]

    def _span_of(self, address: Segments, length: Segments) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Row of the span that holds each range, -1 where none does."""
        if not len(self._spans):
            return np.full(len(address), -1, dtype=np.int64)
        row = np.searchsorted(self._spans[:, 0], address, side="right").astype(np.int64) - 1
        end = self._spans[row, 1]
        held = (row >= 0) & (address <= end) & (length <= end - address)  # the sum may wrap round
        return np.where(held, row, -1)
