# SPDX-License-Identifier: Apache-2.0
"""Where the bytes of windows and posts lie. Tests hold NumPy arrays; what a backend moves may be elsewhere."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from sage_kv_connector.backends.base import Backend

Bytes = npt.NDArray[np.uint8]


def address_of(memory: Bytes) -> int:
    return memory.ctypes.data


class Memory(Protocol):
    """One sort of memory. ``there`` is an address that ``allocate`` returned."""

    def allocate(self, here: Bytes) -> int:
        """Room for as many bytes, until ``free``."""
        ...

    def free(self, there: int) -> None: ...

    def register(self, backend: Backend, address: int, length: int) -> int:
        """Let windows and posts lie in ``[address, address + length)``, a part of what was allocated.

        Returns the region.
        """
        ...

    def deregister(self, backend: Backend, region: int) -> None: ...

    def store(self, there: int, here: Bytes) -> None:
        """Put the bytes of the array there."""
        ...

    def load(self, there: int, here: Bytes) -> None:
        """Put the bytes that lie there into the array."""
        ...


class HostMemory:
    """The arrays themselves."""

    def allocate(self, here: Bytes) -> int:
        return address_of(here)

    def free(self, there: int) -> None:
        pass

    def register(self, backend: Backend, address: int, length: int) -> int:
        return backend.register_memory(address, length)

    def deregister(self, backend: Backend, region: int) -> None:
        backend.deregister_memory(region)

    def store(self, there: int, here: Bytes) -> None:
        pass

    def load(self, there: int, here: Bytes) -> None:
        pass


HOST = HostMemory()


class _Place(NamedTuple):
    array: Bytes
    there: int

    def holds(self, part: Bytes) -> bool:
        start = address_of(self.array)
        return start <= address_of(part) and address_of(part) + part.nbytes <= start + self.array.nbytes

    def address(self, part: Bytes) -> int:
        return self.there + address_of(part) - address_of(self.array)


class Places:
    """Where arrays of a test lie in one sort of memory. Parts of an array lie within it."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._places: list[_Place] = []  # kept: lanes read and write them until the backends are closed
        self._regions: dict[tuple[int, int], int] = {}

    def address(self, array: Bytes) -> int:
        """Where it lies; with its bytes, if it was not there before."""
        for place in self._places:
            if place.holds(array):
                return place.address(array)
        there = self.memory.allocate(array)
        self._places.append(_Place(array, there))
        self.memory.store(there, array)
        return there

    def register(self, backend: Backend, array: Bytes) -> int:
        """Let ``backend`` use it; returns its address."""
        address = self.address(array)
        self._regions[id(backend), address] = self.memory.register(backend, address, array.nbytes)
        return address

    def deregister(self, backend: Backend, array: Bytes) -> None:
        """The opposite of ``register``."""
        self.memory.deregister(backend, self._regions.pop((id(backend), self.address(array))))

    def seen(self, array: Bytes) -> Bytes:
        """The array, with the bytes as they lie there now."""
        self.memory.load(self.address(array), array)
        return array

    def changed(self, array: Bytes) -> None:
        """The test wrote into the array."""
        self.memory.store(self.address(array), array)

    def free(self) -> None:
        """After the backends are closed."""
        for place in self._places:
            self.memory.free(place.there)
        self._places.clear()
