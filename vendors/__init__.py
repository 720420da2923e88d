# SPDX-License-Identifier: Apache-2.0
"""Vendors' accelerators: a ``DeviceRuntime`` for each, over its own C library or over an emulator of it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from sage_kv_connector.devices.runtime import DeviceError, DeviceRuntime, RuntimeUnavailable
from sage_kv_connector.vendors.libraries import load_vendor_library

if TYPE_CHECKING:
    from sage_kv_connector.vendors.emulator.settings import EmulatorSettings

#: Each has ``vendors/<vendor>/runtime.py`` with ``INTERFACE`` and ``create(library)``.
VENDORS = ("ascend", "cambricon", "hygon", "kunlunxin", "nvidia")


def open_runtime(vendor: str, emulator: EmulatorSettings | None = None) -> DeviceRuntime:
    """One vendor's devices: through its real library, or through an emulator with these settings.

    An emulator is never chosen by itself, and each call makes a machine of its own.
    Raises ValueError for an unknown vendor, RuntimeUnavailable when there is no library (or no
    compiler for the emulator), DeviceError when the library does not start.
    """
    if vendor not in VENDORS:
        raise ValueError(f"vendor is {vendor!r}; known are {', '.join(VENDORS)}")
    module = import_module(f"{__name__}.{vendor}.runtime")
    if emulator is None:
        library = load_vendor_library(module.INTERFACE)
    else:
        from sage_kv_connector.vendors.emulator.build import load_emulator

        library = load_emulator(module.INTERFACE, emulator)
    runtime: DeviceRuntime = module.create(library)
    return runtime


def available_runtimes() -> dict[str, int | str]:
    """Vendor → its number of devices here, or why there are none; real libraries only."""
    found: dict[str, int | str] = {}
    for vendor in VENDORS:
        try:
            found[vendor] = open_runtime(vendor).device_count()
        except (RuntimeUnavailable, DeviceError) as error:
            found[vendor] = str(error)
    return found
