# SPDX-License-Identifier: Apache-2.0
"""A vendor's C interface as data: declarations, the types in them, constants.

One table serves three readers: ctypes (:meth:`CInterface.bind`), the check against the vendor's
real headers (``scripts/check_vendor_signatures.py``) and the emulator, which is compiled
against :meth:`CInterface.header`. So they cannot differ.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

CType = Any  # ctypes' own types have no common base that mypy accepts as a restype

#: The C types that interfaces use beside their own.
BASIC: dict[str, CType] = {
    "void": None,
    "char": ctypes.c_char,
    "bool": ctypes.c_bool,
    "int": ctypes.c_int,
    "unsigned int": ctypes.c_uint,
    "unsigned long long": ctypes.c_ulonglong,
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "uint8_t": ctypes.c_uint8,
    "size_t": ctypes.c_size_t,
}
C_NAMES = {
    ctypes.c_char: "char",
    ctypes.c_int: "int",
    ctypes.c_uint: "unsigned int",
    ctypes.c_void_p: "void *",
    ctypes.c_uint8: "uint8_t",
    ctypes.c_uint64: "uint64_t",
}
DECLARATION = re.compile(r"^(?P<result>[\w ]+[ *]+?)(?P<name>\w+)\s*\((?P<arguments>[^()]*)\)$", re.DOTALL)


class SizeBound(ctypes.Structure):
    """Base of a structure of which only this is known, that it is no larger: its layout differs between versions."""


class Prototype(NamedTuple):
    """One C function: its declaration as written, and the same for ctypes."""

    name: str
    declaration: str
    result: CType
    arguments: tuple[CType, ...]


@dataclass(frozen=True)
class CInterface:
    """What this package uses of one vendor's library.

    ``errors`` are the status codes by name, ``constants`` all other numbers; both are checked
    against the headers. ``optional`` functions may be missing in older libraries.
    """

    vendor: str
    title: str  #: the interface's name, for people
    sonames: tuple[str, ...]
    folders: tuple[str, ...]  #: where else to look; may hold $VARIABLES
    types: Mapping[str, CType]
    declarations: str
    constants: Mapping[str, int]
    errors: Mapping[str, int]
    optional: frozenset[str] = frozenset()
    companions: tuple[str, ...] = ()  #: other libraries that have some of the optional functions
    one_of: tuple[str, ...] = ()  #: optional functions of which one must be there, the newest first
    renamed: Mapping[str, str] = field(default_factory=dict)  #: header's name → exported symbol
    #: header's name → the symbol that it is in newer headers, where libraries still have the older one.
    newer_forms: Mapping[str, str] = field(default_factory=dict)
    #: Declarations of forms that older libraries have under the plain names of ``renamed`` ones; all are optional, and
    #: bound as ``name (older)``. ``older_define``: the macro under which headers still declare them.
    older_declarations: str = ""
    older_define: str = ""

    def prototypes(self, older: bool = False) -> Iterator[Prototype]:
        for text in (self.older_declarations if older else self.declarations).split(";"):
            if text.strip():
                yield self._parse(" ".join(text.split()))

    def _parse(self, text: str) -> Prototype:
        found = DECLARATION.match(text)
        if found is None:
            raise ValueError(f"{self.vendor}: not a C declaration: {text!r}")
        words = found["arguments"].strip()
        arguments = [] if words in ("", "void") else words.split(",")
        types = tuple(self._ctype(re.sub(r"\w+$", "", word.strip()), text) for word in arguments)
        return Prototype(found["name"], text, self._ctype(found["result"], text), types)

    def _ctype(self, text: str, where: str) -> CType:
        """The ctypes type of a parameter without its name, or of a result."""
        stars = text.count("*")
        name = text.replace("*", " ").replace("const", " ").strip()
        known = BASIC | dict(self.types)
        if name not in known:
            raise ValueError(f"{self.vendor}: unknown type {name!r} in {where!r}")
        base = known[name]
        if stars and base in (None, ctypes.c_char):  # raw memory; a char* is not always a string
            base, stars = (ctypes.c_void_p if base is None else ctypes.c_char_p), stars - 1
        for _ in range(stars):
            base = ctypes.POINTER(base)
        return base

    def bind(self, library: ctypes.CDLL, *companions: ctypes.CDLL) -> dict[str, Any]:
        """The functions by header name, from the first library that has each; optional ones that none has are left out.

        Raises AttributeError naming a function that should be there.
        """
        bound = {}
        for older in (False, True):
            for prototype in self.prototypes(older):
                symbol = prototype.name if older else self.renamed.get(prototype.name, prototype.name)
                function = None
                for each in (library, *companions):
                    with contextlib.suppress(AttributeError):
                        function = function or each[symbol]
                if function is None:
                    if older or prototype.name in self.optional:
                        continue
                    raise AttributeError(f"{self.title} has no function {symbol}")
                function.restype, function.argtypes = prototype.result, prototype.arguments
                bound[f"{prototype.name} (older)" if older else prototype.name] = function
        return bound

    def error_name(self, code: int) -> str:
        return next((name for name, value in self.errors.items() if value == code), "not a code known here")

    def header(self) -> str:
        """The interface as a C++ header of our own, for the emulator."""
        lines = [
            "// Generated from vendors/*/abi.py.",
            "#pragma once",
            "#include <cstddef>",
            "#include <cstdint>",
        ]
        for name, ctype in self.types.items():
            lines.append(f"typedef {_c_name(ctype)} {name};")
        for name, value in {**self.constants, **self.errors}.items():
            lines.append(f"constexpr long long {name} = {value};")
        lines += [f"#define {name} {symbol}" for name, symbol in self.renamed.items()]
        lines.append('#pragma GCC visibility push(default)\nextern "C" {')
        lines += [f"{prototype.declaration};" for prototype in self.prototypes()]
        return "\n".join([*lines, "}", "#pragma GCC visibility pop", ""])


def _c_name(ctype: CType) -> str:
    if isinstance(ctype, type) and issubclass(ctype, ctypes.Structure):
        members = []
        for name, member in ctype._fields_:  # type: ignore[misc]
            if isinstance(member, type) and issubclass(member, ctypes.Array):
                members.append(f"{_c_name(member._type_)} {name}[{member._length_}];")
            else:
                members.append(f"{_c_name(member)} {name};")
        return f"struct {{ {' '.join(members)} }}"
    return C_NAMES[ctype]
