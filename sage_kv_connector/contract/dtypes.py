# SPDX-License-Identifier: Apache-2.0
"""The table of dtypes: the only list of their names. What others need is derived from it."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Dtype(NamedTuple):
    """One dtype.

    ``wire``: how it stands on the wire: "cast" (a cast is all that happens), "scaled" (codes with scales), "" (never).
    ``kind``: "float", "integer" (codes in two's complement), or "bytes". ``converted``: caches in it can be
    mapped to other layouts and dtypes. ``code_max``: the largest code value of a scaled one. ``zero_point``: its
    scales may have one. ``aliases``: what engines and torch call it beside its name.
    """

    name: str
    bits: int
    kind: Literal["float", "integer", "bytes"]
    wire: Literal["", "cast", "scaled"] = ""
    converted: bool = False
    code_max: float = 0.0
    zero_point: bool = False
    aliases: tuple[str, ...] = ()


DTYPES = (
    Dtype("fp32", 32, "float", "cast", True, aliases=("float32", "float")),
    Dtype("fp16", 16, "float", "cast", True, aliases=("float16", "half")),
    Dtype("bf16", 16, "float", "cast", True, aliases=("bfloat16",)),
    Dtype("fp8_e4m3", 8, "float", "scaled", True, 448.0, aliases=("float8_e4m3fn", "fp8")),
    Dtype("fp8_e5m2", 8, "float", "scaled", True, 57344.0, aliases=("float8_e5m2",)),
    Dtype("int4", 4, "integer", "scaled", False, 7.0, zero_point=True),
    Dtype("int8", 8, "integer"),
    Dtype("uint8", 8, "bytes"),
)

_BY_NAME = {dtype.name: dtype for dtype in DTYPES}
_BY_ALIAS = {alias: dtype.name for dtype in DTYPES for alias in (dtype.name, *dtype.aliases)}

#: Bits of one element.
DTYPE_BITS = {dtype.name: dtype.bits for dtype in DTYPES}
#: dtypes of caches between which conversion is defined.
CONVERTIBLE_DTYPES = tuple(dtype.name for dtype in DTYPES if dtype.converted)
#: dtypes that need no scale on the wire: a cast is all that happens.
CAST_DTYPES = tuple(dtype.name for dtype in DTYPES if dtype.wire == "cast")
#: dtypes with few enough bits to need scales on the wire.
SCALED_DTYPES = tuple(dtype.name for dtype in DTYPES if dtype.wire == "scaled")
WIRE_DTYPES = CAST_DTYPES + SCALED_DTYPES
#: Largest code value of each scaled dtype.
CODE_MAX = {name: _BY_NAME[name].code_max for name in SCALED_DTYPES}
#: dtypes of caches whose engine keeps a scale beside the codes (value = code × scale).
ENGINE_SCALED_DTYPES = tuple(name for name in SCALED_DTYPES if _BY_NAME[name].converted)


def dtype(name: str) -> Dtype:
    """The row of a dtype. Raises KeyError for one that is not in the table."""
    return _BY_NAME[name]


def dtype_of_engine(name: str) -> str | None:
    """Our name of what an engine or torch calls ``name`` (with or without ``torch.``); None if we have none."""
    return _BY_ALIAS.get(name.removeprefix("torch."))
