# SPDX-License-Identifier: Apache-2.0
"""The tables of ``vendors/*/abi.py`` against the vendors' headers, and that the check would find a mistake."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from sage_kv_connector.devices.runtime import DeviceError
from sage_kv_connector.vendors import vendor_module
from sage_kv_connector.vendors.cambricon.abi import CNRT
from sage_kv_connector.vendors.common.c_interface import CInterface
from scripts.check_vendor_signatures import Headers, check, header_sets, interface_of


def test_tables_agree_with_the_headers(vendor: str) -> None:
    sets = header_sets(vendor)
    if not sets:
        pytest.skip(f"no headers of {vendor} are here or can be fetched")
    for headers in sets:
        assert check(interface_of(vendor), headers) == "", headers.source


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


def test_kinds_of_errors_name_codes_of_the_table(vendor: str) -> None:

    kinds: Mapping[type[DeviceError], frozenset[str]] = vendor_module(vendor, "runtime").ERROR_KINDS
    named = [name for names in kinds.values() for name in names]
    assert set(named) <= set(interface_of(vendor).errors)
    assert len(named) == len(set(named))


def test_optional_and_renamed_functions_exist(vendor: str) -> None:
    interface = interface_of(vendor)
    names = {prototype.name for prototype in interface.prototypes()}
    assert interface.optional <= names
    assert set(interface.renamed) <= names
