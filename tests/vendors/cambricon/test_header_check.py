# SPDX-License-Identifier: Apache-2.0
"""That the comparison with headers would find a mistake: tried on this vendor's, which are in the repository."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import pytest

from sage_kv_connector.vendors.cambricon.abi import CNRT
from sage_kv_connector.vendors.common.c_interface import CInterface
from scripts.check_vendor_signatures import Headers, check, header_sets


def declared_otherwise(text: str, instead: str) -> CInterface:
    assert text in CNRT.declarations
    return replace(CNRT, declarations=CNRT.declarations.replace(text, instead))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (declared_otherwise("cnrtMalloc(void **pPtr, size_t", "cnrtMalloc(void **pPtr, int"), "cnrtMalloc"),
        (declared_otherwise("const char *cnrtGetErrorStr", "char *cnrtGetErrorStr"), "cnrtGetErrorStr"),
        (replace(CNRT, constants={**CNRT.constants, "cnrtMemcpyDevToHost": 1}), "cnrtMemcpyDevToHost"),
        (replace(CNRT, errors={**CNRT.errors, "cnrtErrorNoMem": 100101}), "cnrtErrorNoMem"),
        (replace(CNRT, types={**CNRT.types, "cnrtRet_t": ctypes.c_uint64}), "size of cnrtRet_t"),
        (replace(CNRT, types={**CNRT.types, "cnrtQueue_t": ctypes.c_uint64}), "kind of cnrtQueue_t"),
        (replace(CNRT, renamed={"cnrtFree": "cnrtFree_v2"}), "cnrtFree_v2"),
    ],
)
def test_the_check_finds(changed: CInterface, said: str) -> None:
    (headers,) = header_sets("cambricon")
    assert said in check(changed, headers)


def test_the_check_finds_a_moved_member(tmp_path: Path) -> None:
    (headers,) = header_sets("cambricon")
    text = (headers.folders[0] / headers.includes[0]).read_text()
    moved = text.replace("hostPointer;", "third;").replace("devicePointer;", "hostPointer;")
    moved = moved.replace("third;", "devicePointer;")
    assert moved != text
    (tmp_path / "moved.h").write_text(moved)
    assert "cnrtPointerAttributes_t.hostPointer" in check(
        CNRT, Headers("cambricon", "moved", (tmp_path,), ("moved.h",))
    )
