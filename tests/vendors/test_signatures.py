# SPDX-License-Identifier: Apache-2.0
"""The tables of ``vendors/*/abi.py`` against the vendors' headers."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from sage_kv_connector.devices.runtime import DeviceError
from sage_kv_connector.vendors import vendor_module
from scripts.check_vendor_signatures import check, header_sets
from tests.vendors.rig import interface_of


def test_tables_agree_with_the_headers(vendor: str) -> None:
    sets = header_sets(vendor)
    if not sets:
        pytest.skip(f"no headers of {vendor} are here or can be fetched")
    for headers in sets:
        assert check(interface_of(vendor), headers) == "", headers.source


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
