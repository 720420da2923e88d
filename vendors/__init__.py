# SPDX-License-Identifier: Apache-2.0
"""Vendors' accelerators: a ``DeviceRuntime`` for each, over its own C library or over an emulator of it.

A vendor is a package: ``descriptor.yaml`` (its chips), ``abi.py`` and ``runtime.py`` (``INTERFACE`` and ``create``),
``probe.py`` (``probe``) and ``emulator.cc``. Ours lie beside this module. Others ship theirs by an entry point of the
group ``sage_kv_connector.vendors``: its name is the vendor's, its value the package. Ours win over one of the
same name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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

_HERE = Path(__file__).parent
#: Ours: every folder here with a descriptor.
VENDORS = tuple(sorted(path.parent.name for path in _HERE.glob("*/descriptor.yaml")))
#: Entry points of third parties' vendors.
ENTRY_POINTS = "sage_kv_connector.vendors"
#: A vendor's modules, and what each must have.
PARTS = {"runtime": ("INTERFACE", "create"), "probe": ("probe",)}


class BrokenVendor(RuntimeUnavailable):
    """A third party's vendor is not what it should be; the text names its entry point."""

    def __init__(self, vendor: str, problem: str) -> None:
        entry = f"{vendor} = {_packages().get(vendor)}"
        super().__init__(f"vendor {vendor!r}, entry point {entry!r} of {ENTRY_POINTS}: {problem}")


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


@contextmanager
def third_party(vendor: str, doing: str, not_its_fault: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Whatever a third party's code raises inside becomes BrokenVendor; ours raises as it is.

    ``not_its_fault``: what it may raise by its contract.
    """
    try:
        yield
    except Exception as error:
        if vendor in VENDORS or isinstance(error, (BrokenVendor, *not_its_fault)):
            raise
        raise BrokenVendor(vendor, f"{doing} raised {type(error).__name__}: {error}") from error


def vendor_module(vendor: str, part: str) -> ModuleType:
    """``runtime`` or ``probe`` of a vendor.

    Raises ValueError for an unknown vendor, and BrokenVendor for a third party's that can't be used.
    """
    name = f"{_package(vendor)}.{part}"
    with third_party(vendor, f"importing {name}"):
        module = import_module(name)
    for member in PARTS[part]:
        if not hasattr(module, member):
            raise BrokenVendor(vendor, f"{name} has no {member}")
    if part == "runtime" and module.INTERFACE.vendor != vendor:
        raise BrokenVendor(vendor, f"its INTERFACE says that the vendor is {module.INTERFACE.vendor!r}")
    return module


def descriptor_text(vendor: str) -> str:
    """A vendor's ``descriptor.yaml``. Raises as ``vendor_module``."""
    package = _package(vendor)
    with third_party(vendor, "reading its descriptor.yaml"):
        return (files(package) / "descriptor.yaml").read_text()


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
        except (RuntimeUnavailable, DeviceError) as error:
            found[vendor] = str(error)
    return found
