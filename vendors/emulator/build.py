# SPDX-License-Identifier: Apache-2.0
"""Compiles a vendor's emulator at the first use and loads it.

Kept under ``$SAGE_KVT_CACHE`` (default ``~/.cache/sage_kv_connector``) by the digest of sources and interface.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from sage_kv_connector.devices.runtime import RuntimeUnavailable
from sage_kv_connector.vendors.common.c_interface import CInterface
from sage_kv_connector.vendors.common.libraries import Library
from sage_kv_connector.vendors.emulator.control import EmulatorControl
from sage_kv_connector.vendors.emulator.settings import EmulatorSettings

SOURCES = Path(__file__).parent / "csrc"
MACHINE = (
    "cuda_like.h", "machine.h", "settings.h", "streams.h",
    "settings.cc", "memory.cc", "ipc.cc", "streams.cc", "copies.cc", "kernels.cc", "control.cc",
)  # fmt: skip
OPTIONS = (
    "-std=c++17",
    "-O2",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fvisibility=hidden",
)


def load_emulator(interface: CInterface, calls: Path, settings: EmulatorSettings) -> Library:
    """A new machine; ``calls`` is the vendor's ``emulator.cc``.

    Raises RuntimeUnavailable when it can't be compiled, with the compiler's words.
    """
    built = compiled(interface, calls)
    # The linker gives the same library for the same file; a copy is a machine of its own.
    with tempfile.TemporaryDirectory() as folder:
        library = ctypes.CDLL(str(shutil.copy(built, folder)))
    return Library(
        f"emulator of {interface.sonames[0]}", interface.bind(library), EmulatorControl(library, settings)
    )


def compiled(interface: CInterface, calls: Path) -> Path:
    """The emulator of one vendor, compiled at its first use. Raises RuntimeUnavailable."""
    sources = [*(SOURCES / name for name in MACHINE), calls]
    compiler = next(
        filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "c++", "g++", "clang++"))), None
    )
    header = interface.header()
    parts = [*(source.read_bytes() for source in sources), header.encode(), " ".join(OPTIONS).encode()]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    root = Path(os.environ.get("SAGE_KVT_CACHE") or Path.home() / ".cache" / "sage_kv_connector")
    kept = root / "emulators" / f"{interface.vendor}-{digest}.so"
    if kept.exists():
        return kept
    if compiler is None:
        raise RuntimeUnavailable(
            "the emulator has to be compiled and no C++ compiler was found (Debian/Ubuntu: apt-get install g++)"
        )
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vendor_abi.h").write_text(header)
        output = Path(folder, "emulator.so")
        units = [str(source) for source in sources if source.suffix == ".cc"]
        command = [compiler, *OPTIONS, "-I", folder, "-I", str(SOURCES), "-o", str(output), *units, "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeUnavailable(f"{' '.join(command)} failed: {done.stderr.strip()}")
        partial = kept.with_suffix(f".{os.getpid()}")
        shutil.copy(output, partial)
        partial.rename(kept)
    return kept
