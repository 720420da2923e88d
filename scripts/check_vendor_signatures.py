# SPDX-License-Identifier: Apache-2.0
"""Compare what the runtimes believe of their vendors' C interfaces with the vendors' headers.

    python scripts/check_vendor_signatures.py [--require VENDOR[,VENDOR …] | --require all]

From each table in ``vendors/<vendor>/abi.py`` a C++ file is made that includes the headers,
declares every function again, and asserts every constant, and the size and members of every type. The
compiler refuses what differs. The symbols of the result are compared as well, since headers
rename functions. Which headers: ``tests/vendors/<vendor>/headers.yaml``, a list of

    source:    for people; where it is missing, the folder
    folder:    where the headers are, may hold *; with one of the three below, a folder in that
    package:   an installed Python package that has them
    lock:      a requirements file of the repository; its wheels are fetched once into $SAGE_KVT_CACHE
    ours:      true for declarations that we wrote down, beside headers.yaml
    includes:  the files to include
    defines:   macros
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sage_kv_connector.vendors import VENDORS, vendor_module
from sage_kv_connector.vendors.common.c_interface import CInterface, CType, SizeBound

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("SAGE_KVT_CACHE") or Path.home() / ".cache" / "sage_kv_connector")
TESTS = ROOT / "tests" / "vendors"


class Headers(NamedTuple):
    """One set of headers to compile against."""

    vendor: str
    source: str  #: for people
    folders: tuple[Path, ...]
    includes: tuple[str, ...]
    defines: tuple[str, ...] = ()
    vendors_own: bool = True  #: False for declarations that we wrote down


def header_sets(vendor: str) -> list[Headers]:
    """The vendor's headers that are here; fetches those of a lock. May be empty."""
    own = TESTS / vendor
    listed = own / "headers.yaml"
    found = []
    for entry in yaml.safe_load(listed.read_text()) if listed.exists() else []:
        includes = tuple(entry["includes"])
        for folder in folders_of(entry, own):
            if all((folder / name).exists() for name in includes):
                source, ours = entry.get("source", str(folder)), entry.get("ours", False)
                found.append(
                    Headers(vendor, source, (folder,), includes, tuple(entry.get("defines", ())), not ours)
                )
    return found


def folders_of(entry: dict[str, Any], own: Path) -> list[Path]:
    """Where the headers of an entry may be."""
    if entry.get("ours"):
        return [own]
    folder = entry["folder"]
    if "lock" in entry:
        fetched = fetched_headers(ROOT / entry["lock"], folder)
        return [fetched] if fetched is not None else []
    if "package" in entry:
        package = importlib.util.find_spec(entry["package"])
        known = package is not None and package.origin is not None
        return [Path(package.origin).parent / folder] if known else []
    return sorted(Path("/").glob(folder.lstrip("/")))


def fetched_headers(lock: Path, inside: str) -> Path | None:
    """A folder of the lock's wheels, fetched once a lock; None, with the reason on stderr, if that fails."""
    folder = CACHE / f"vendor-headers-{hashlib.sha256(lock.read_bytes()).hexdigest()[:12]}"
    include = folder / inside
    if include.is_dir():
        return include
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "-d", scratch, "-r", str(lock)]
        # Headers are the same for every Python; name one so that any can fetch them.
        pip += ["--only-binary=:all:", "--python-version=3.11", "--platform=manylinux_2_28_x86_64"]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode != 0:
            print(f"{lock.name} could not be fetched: {done.stderr.strip()[-500:]}", file=sys.stderr)
            return None
        unpacked = Path(scratch) / "unpacked"
        for wheel in Path(scratch).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.startswith(f"{inside}/")]
                archive.extractall(unpacked, names)
        try:
            unpacked.rename(folder)
        except OSError:  # another process was faster
            pass
    return include if include.is_dir() else None


def check(interface: CInterface, headers: Headers) -> str:
    """What differs, in the compiler's words; empty if nothing does."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise FileNotFoundError("a C++ compiler is needed (Debian/Ubuntu: apt-get install g++)")
    with tempfile.TemporaryDirectory() as scratch:
        source, result = Path(scratch, "check.cc"), Path(scratch, "check.o")
        source.write_text(program(interface, headers))
        command = [compiler, "-std=c++17", "-c", "-Wall", "-Wno-unused", "-Werror"]
        command += [word for folder in headers.folders for word in ("-isystem", str(folder))]
        command += [f"-D{name}" for name in headers.defines]
        done = subprocess.run([*command, "-o", str(result), str(source)], capture_output=True, text=True)
        if done.returncode != 0:
            return done.stderr
        listed = subprocess.run(["nm", "-u", str(result)], capture_output=True, text=True, check=True)
    older = {newer: name for name, newer in interface.newer_forms.items()}
    found = {older.get(line.split()[-1], line.split()[-1]) for line in listed.stdout.splitlines()}
    wanted = {interface.renamed.get(each.name, each.name) for each in interface.prototypes()}
    missing, extra = wanted - found, {name for name in found - wanted if not name.startswith("_")}
    if missing or extra:
        return f"symbols: the table says {sorted(missing)}, the headers make it {sorted(extra)}"
    return ""


def check_older(interface: CInterface, headers: Headers) -> str:
    """The same for the forms of older libraries, where the headers still declare them."""
    if not interface.older_declarations:
        return ""
    older = dataclasses.replace(
        interface,
        declarations=interface.older_declarations,
        older_declarations="",
        renamed={},
        newer_forms={},
    )
    return check(older, headers._replace(defines=(*headers.defines, interface.older_define)))


def program(interface: CInterface, headers: Headers) -> str:
    lines = ["#include <cstddef>", "#include <cstdint>", "#include <type_traits>"]
    lines += [f"#include <{name}>" for name in headers.includes]
    lines.append('extern "C" {')
    lines += [f"{prototype.declaration};" for prototype in interface.prototypes()]
    lines.append("}")
    lines += [
        f'static_assert(static_cast<long long>({name}) == {value}, "{name}");'
        for name, value in {**interface.constants, **interface.errors}.items()
    ]
    for name, ctype in interface.types.items():
        lines += assertions(name, ctype)
    for index, each in enumerate(interface.prototypes()):  # the C function among C++ overloads of HIP's
        pointer = re.sub(rf"\b{each.name}\b", f"(*used_{index})", each.declaration, count=1)
        lines.append(f"{pointer} = &{each.name};")
    return "\n".join(lines) + "\n"


def assertions(name: str, ctype: CType) -> list[str]:
    if issubclass(ctype, SizeBound):
        return [f'static_assert(sizeof({name}) <= {ctypes.sizeof(ctype)}, "size of {name}");']
    lines = [f'static_assert(sizeof({name}) == {ctypes.sizeof(ctype)}, "size of {name}");']
    pointer = "" if ctype is ctypes.c_void_p else "!"
    lines.append(f'static_assert({pointer}std::is_pointer<{name}>::value, "kind of {name}");')
    if issubclass(ctype, ctypes.Structure):
        for field, *_ in ctype._fields_:
            place = getattr(ctype, field)
            lines.append(
                f"static_assert(offsetof({name}, {field}) == {place.offset} && "
                f'sizeof({name}::{field}) == {place.size}, "{name}.{field}");'
            )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--require", default="", help="vendors whose headers must be here, or all")
    require = parser.parse_args().require
    required = VENDORS if require == "all" else [name for name in require.split(",") if name]
    unknown = set(required) - set(VENDORS)
    if unknown:
        parser.error(f"--require: {', '.join(sorted(unknown))} is none of {', '.join(VENDORS)}")
    wrong = 0
    for vendor in VENDORS:
        sets = header_sets(vendor)
        if not sets:
            print(f"{vendor}: no headers here")
            wrong += vendor in required
        for headers in sets:
            interface: CInterface = vendor_module(vendor, "runtime").INTERFACE
            problem = check(interface, headers) or check_older(interface, headers)
            counts = f"{sum(1 for _ in interface.prototypes())} functions, {len(interface.types)} types, "
            counts += f"{len(interface.constants) + len(interface.errors)} constants"
            note = "" if headers.vendors_own else " (not the vendor's file)"
            print(f"{vendor}: {counts} against {headers.source}{note}: {'DIFFERS' if problem else 'same'}")
            if problem:
                print(problem)
                wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
