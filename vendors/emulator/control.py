# SPDX-License-Identifier: Apache-2.0
"""The switches of a running emulator: ``control_of(runtime)``."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any, NamedTuple

from sage_kv_connector.devices.runtime import DeviceRuntime
from sage_kv_connector.vendors.emulator.settings import DIRECTIONS, DirectionName, EmulatorSettings


class Counts(NamedTuple):
    """Calls that copy, copies in them (a batch is one call), bytes."""

    calls: int
    copies: int
    bytes: int


class EmulatorControl:
    """Changes rates, latency, held engines and faults while the machine runs.

    The machine's device memory goes with the last reference to this: to the runtime, that is.
    """

    def __init__(self, library: ctypes.CDLL, settings: EmulatorSettings) -> None:
        self._configure = library.sage_emulator_configure
        self._configure.restype, self._configure.argtypes = ctypes.c_char_p, (ctypes.c_char_p,)
        self._counts = library.sage_emulator_counts
        self._counts.restype, self._counts.argtypes = None, (ctypes.POINTER(ctypes.c_uint64),)
        self._launches = library.sage_emulator_launches
        self._launches.restype, self._launches.argtypes = ctypes.c_uint64, ()
        self.settings = settings
        self._apply(settings)
        library.sage_emulator_forget_memory.restype = None
        # Not at the process's end: the kernel gives it back then, and lanes may still run.
        weakref.finalize(self, library.sage_emulator_forget_memory).atexit = False

    def set(self, **changes: Any) -> None:
        """Change settings by name; a fault that is named counts copies from here on.

        Raises ValueError for a setting that is part of the machine, such as its memory.
        """
        anew = not changes.keys().isdisjoint({"dma_error_after_copies", "device_lost_after_copies"})
        self._apply(EmulatorSettings.model_validate(self.settings.model_dump() | changes), anew)

    def hold(self, *directions: DirectionName) -> None:
        """Let copies in these directions wait, and no others."""
        self.set(held=frozenset(directions))

    def release(self) -> None:
        self.hold()

    def counts(self) -> dict[str, Counts]:
        """By direction, what was asked of the machine since its start."""
        found = (ctypes.c_uint64 * (3 * len(DIRECTIONS)))()
        self._counts(found)
        return {name: Counts(*found[3 * i : 3 * i + 3]) for i, name in enumerate(DIRECTIONS)}

    def launches(self) -> int:
        """How many kernels were launched since the machine's start."""
        return int(self._launches())

    def _apply(self, settings: EmulatorSettings, count_copies_anew: bool = False) -> None:
        text = f"{settings.text()}count_copies_anew={int(count_copies_anew)}\n"
        wrong = self._configure(text.encode())
        if wrong:
            raise ValueError(f"emulator: {wrong.decode()}")
        self.settings = settings


def control_of(runtime: DeviceRuntime) -> EmulatorControl:
    """The switches behind a runtime; raises ValueError for one that is not emulated."""
    control = getattr(runtime, "emulator", None)
    if not isinstance(control, EmulatorControl):
        raise ValueError(f"{runtime.api} is not an emulator")
    return control
