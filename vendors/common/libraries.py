# SPDX-License-Identifier: Apache-2.0
"""Finds and loads a vendor's runtime library."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sage_kv_connector.devices.runtime import RuntimeUnavailable
from sage_kv_connector.vendors.common.c_interface import CInterface

if TYPE_CHECKING:
    from sage_kv_connector.vendors.emulator.control import EmulatorControl


@dataclass(frozen=True)
class Library:
    """A loaded library and its functions by name."""

    name: str  #: what was loaded, for people
    functions: dict[str, Any]
    emulator: EmulatorControl | None = None


def load_vendor_library(interface: CInterface) -> Library:
    """The first of the vendor's sonames that loads, by the dynamic linker's rules, then in its usual folders.

    Raises RuntimeUnavailable with everything that was tried and why it failed.
    """
    failures = []
    for name in candidates(interface):
        try:
            library = ctypes.CDLL(name)
        except OSError as error:
            failures.append(str(error))
            continue
        try:
            return Library(name, interface.bind(library, *_companions(interface)))
        except AttributeError as error:
            failures.append(f"{name}: {error}")
    raise RuntimeUnavailable(
        f"{interface.vendor}: no {interface.title} library could be loaded: {'; '.join(failures)}"
    )


def _companions(interface: CInterface) -> Iterator[ctypes.CDLL]:
    """Those that load; what would be missing without the others is optional."""
    for soname in interface.companions:
        for name in candidates(interface, (soname,)):
            try:
                yield ctypes.CDLL(name)
                break
            except OSError:
                continue


def candidates(interface: CInterface, sonames: tuple[str, ...] = ()) -> list[str]:
    """Sonames first (the process may have one loaded already), then existing files in the usual folders.

    ``sonames``: of the interface's own library, if none are given.
    """
    sonames = sonames or interface.sonames
    folders = [os.path.expandvars(folder) for folder in interface.folders]
    paths = [Path(folder, name) for folder in folders for name in sonames]
    return [*sonames, *(str(path) for path in paths if path.exists())]
