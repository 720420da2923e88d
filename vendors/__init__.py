# SPDX-License-Identifier: Apache-2.0
"""Vendors' accelerators: a ``DeviceRuntime`` for each, over its own C library or over an emulator of it.

A vendor is a package: ``descriptor.yaml`` (its chips), ``abi.py`` and ``runtime.py`` (``INTERFACE`` and ``create``),
``probe.py`` (``probe``) and ``emulator.cc``. Ours lie beside this module. Others ship theirs by an entry point of the
group ``sage_kv_connector.vendors``: its name is the vendor's, its value the package. Ours win over one of the
same name.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from sage_kv_connector.devices.runtime import DeviceError, DeviceRuntime, RuntimeUnavailable
from sage_kv_connector.vendors.common.libraries import load_vendor_library

if TYPE_CHECKING:
    from sage_kv_connector.vendors.emulator.settings import EmulatorSettings

#: To add a vendor, add its folder and its name.
VENDORS = ("ascend", "cambricon", "hygon", "kunlunxin", "nvidia")
#: Entry points of third parties' vendors.
ENTRY_POINTS = "sage_kv_connector.vendors"


@cache
def _packages() -> dict[str, str]:
    """Vendor → package, ours first."""
    ours = {name: f"{__name__}.{name}" for name in VENDORS}
    shipped = {entry.name: entry.value for entry in entry_points(group=ENTRY_POINTS)}
    return ours | {name: package for name, package in shipped.items() if name not in ours}


def vendor_names() -> tuple[str, ...]:
    """Every vendor that is known here; imports none."""
    return tuple(_packages())


def _package(vendor: str) -> str:
    if vendor not in _packages():
        raise ValueError(f"vendor is {vendor!r}; known are {', '.join(vendor_names())}")
    return _packages()[vendor]


def vendor_module(vendor: str, part: str) -> ModuleType:
    """``runtime`` or ``probe`` of a vendor.

    Raises ValueError for an unknown vendor, and for a third party's that can't be loaded.
    """
    package = _package(vendor)
    try:
        return import_module(f"{package}.{part}")
    except ImportError as error:
        if vendor in VENDORS:
            raise
        raise ValueError(
            f"vendor {vendor!r}: the entry point {package!r} of {ENTRY_POINTS} can't be loaded: {error}"
        ) from error


def descriptor_text(vendor: str) -> str:
    """A vendor's ``descriptor.yaml``. Raises ValueError as ``vendor_module``."""
    package = _package(vendor)
    try:
        return (files(package) / "descriptor.yaml").read_text()
    except (ImportError, OSError) as error:
        if vendor in VENDORS:
            raise
        raise ValueError(
            f"vendor {vendor!r}: {package!r} has no descriptor.yaml that can be read: {error}"
        ) from error


def open_runtime(vendor: str, emulator: EmulatorSettings | None = None) -> DeviceRuntime:
    """One vendor's devices: through its real library, or through an emulator with these settings.

    An emulator is never chosen by itself, and each call makes a machine of its own.
    Raises ValueError for an unknown vendor, RuntimeUnavailable when there is no library (or no
    compiler for the emulator), DeviceError when the library does not start.
    """
    module = vendor_module(vendor, "runtime")
    if emulator is None:
        library = load_vendor_library(module.INTERFACE)
    else:
        from sage_kv_connector.vendors.emulator.build import load_emulator

        calls = Path(str(module.__file__)).parent / "emulator.cc"
        library = load_emulator(module.INTERFACE, calls, emulator)
    runtime: DeviceRuntime = module.create(library)
    return runtime


def available_runtimes() -> dict[str, int | str]:
    """Vendor → its number of devices here, or why there are none; real libraries only."""
    found: dict[str, int | str] = {}
    for vendor in vendor_names():
        try:
            found[vendor] = open_runtime(vendor).device_count()
        except (RuntimeUnavailable, DeviceError, ValueError) as error:
            found[vendor] = str(error)
    return found
