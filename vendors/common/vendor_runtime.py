# SPDX-License-Identifier: Apache-2.0
"""What the five runtimes share: checked calls, errors by kind, what must never raise.

A vendor's class adds the calls themselves. See ``devices/runtime.py`` for what
every method has to keep.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from sage_kv_connector.devices.runtime import (
    DeviceError,
    DeviceLost,
    Launch,
    UnsupportedByRuntime,
)
from sage_kv_connector.vendors.common.c_interface import CInterface
from sage_kv_connector.vendors.common.libraries import Library


class VendorRuntime:
    """Base of a vendor's runtime; ``interface`` and ``kinds`` are the vendor's data."""

    interface: ClassVar[CInterface]
    #: Names of status codes (keys of ``interface.errors``) by the error they mean.
    kinds: ClassVar[Mapping[type[DeviceError], frozenset[str]]]

    def __init__(self, library: Library) -> None:
        self.vendor = self.interface.vendor
        self.emulated = library.emulator is not None
        self.emulator = library.emulator  #: holds, rates and faults of the emulator, None on a real library
        note = ", emulated" if self.emulated else ""
        self.api = f"{self.interface.title} ({library.name}{note})"
        self._c = library.functions
        self._lock = threading.Lock()  # guards what an object remembers of addresses and handles
        self._allocated: dict[int, int] = {}  # address → bytes, where the library does not tell
        errors = self.interface.errors
        self._error_of = {errors[name]: kind for kind, names in self.kinds.items() for name in names}

    # Calls

    def _call(self, name: str, *arguments: Any) -> None:
        """Call a function that returns a status; raises the error that the status means."""
        self._check(name, self._function(name)(*arguments))

    def _function(self, name: str) -> Any:
        function = self._c.get(name)
        if function is None:
            raise self._unsupported(name)
        return function

    def _check(self, name: str, status: int) -> None:
        """Raises the error that a status of the function ``name`` means."""
        if status != 0:
            raise self._error(name, status)

    def _error(self, call: str, status: int) -> DeviceError:
        kind = self._error_of.get(status, DeviceError)
        detail = self._explain(status)
        if self.emulated and "emulated" not in detail:
            detail = f"emulated {detail}".strip()
        return kind(self.vendor, call, status, self.interface.error_name(status), detail)

    def _explain(self, status: int) -> str:
        """The vendor's own words about a failure of this thread, if it has any."""
        return ""

    def _unsupported(
        self, call: str, detail: str = "the library has no such function"
    ) -> UnsupportedByRuntime:
        return UnsupportedByRuntime(self.vendor, call, 0, "unsupported", detail)

    def _has(self, *names: str) -> bool:
        return all(name in self._c for name in names)

    @contextlib.contextmanager
    def _unless_lost(self) -> Iterator[None]:
        """For calls that give something back: what a lost device had is gone already."""
        with contextlib.suppress(DeviceLost):
            yield

    def _pointer(self, name: str, *arguments: Any) -> int:
        """Call a function whose first argument receives a pointer or a handle; returns that."""
        answer = ctypes.c_void_p()
        self._call(name, ctypes.byref(answer), *arguments)
        return answer.value or 0

    def _last_pointer(self, name: str, *arguments: Any) -> int:
        """The same of a function whose last argument does."""
        answer = ctypes.c_void_p()
        self._call(name, *arguments, ctypes.byref(answer))
        return answer.value or 0

    # What a vendor may do better

    def ipc_process_id(self, device: int) -> int:
        return os.getpid()

    def load_function(self, device: int, code: bytes, name: str) -> int:
        raise self._unsupported("load_function", self._no_kernels)

    def launch(self, device: int, launch: Launch, stream: int) -> None:
        raise self._unsupported("launch", self._no_kernels)

    def architecture(self, device: int) -> str:
        raise self._unsupported("architecture", self._no_kernels)

    @property
    def _no_kernels(self) -> str:
        return f"no kernels are launched through {self.interface.title} yet"

    def _own_allocation(self, address: int, nbytes: int) -> tuple[int, int]:
        """``allocation_of`` for a library that does not tell: only of what this object allocated."""
        with self._lock:
            found = next((each for each in self._allocated.items() if each[0] <= address < sum(each)), None)
        if found is None:
            raise self._unsupported(
                "allocation_of", "the library does not tell where others' allocations begin"
            )
        return self._whole_range(*found, address, nbytes)

    def _remember(self, address: int, nbytes: int) -> int:
        with self._lock:
            self._allocated[address] = nbytes
        return address

    def _forget(self, address: int) -> None:
        with self._lock:
            self._allocated.pop(address, None)

    def _whole_range(self, base: int, size: int, address: int, nbytes: int) -> tuple[int, int]:
        """The allocation, or ValueError for a range that ends behind it."""
        if not base <= address <= address + nbytes <= base + size:
            raise ValueError(
                f"the range {address:#x} + {nbytes} is not inside one allocation; {base:#x} + {size} holds its start"
            )
        return base, size

    def _handle_of_length(self, handle: bytes, length: int) -> bytes:
        """A handle that came from a peer, or ValueError."""
        if len(handle) != length:
            raise ValueError(f"an IPC handle of {self.interface.title} has {length} bytes, not {len(handle)}")
        return handle
