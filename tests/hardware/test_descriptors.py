# SPDX-License-Identifier: Apache-2.0
"""The tables of chips, and the documents made from them."""

from __future__ import annotations

import pytest

from sage_kv_connector.hardware.probing.accelerator_descriptor import Fact, LinkKind
from sage_kv_connector.hardware.probing.profile import published_schema, schema
from sage_kv_connector.hardware.report.descriptors import descriptors, find_descriptor
from sage_kv_connector.vendors import VENDORS
from scripts.hardware_documents import MATRIX, matrix


def test_documents_are_current() -> None:
    assert published_schema() == schema(), "run python -m scripts.hardware_documents"
    assert MATRIX.read_text() == matrix(), "run python -m scripts.hardware_documents"


def test_every_chip_has_a_host_link_and_one_name() -> None:
    names = [chip.chip for table in map(descriptors, VENDORS) for chip in table.chips]
    assert len(names) == len(set(names))
    for table in map(descriptors, VENDORS):
        assert table.vendor in VENDORS and table.checked_on
        ids = [one for chip in table.chips for one in chip.pci_devices]
        assert len(ids) == len(set(ids)), table.vendor
        for chip in table.chips:
            assert chip.link(LinkKind.pcie) is not None, chip.chip
            words = [word for link in chip.links for word in link.cells]
            assert len(words) == len(set(words)), chip.chip


def test_a_vendor_without_a_table_is_named() -> None:
    with pytest.raises(ValueError, match=f"vendor 'acme' has no descriptor; allowed: {VENDORS[0]}"):
        descriptors("acme")


def test_a_chip_that_no_table_has_is_none() -> None:
    assert all(find_descriptor(vendor, "ffff", "something new") is None for vendor in VENDORS)


def test_every_link_is_common_or_its_vendors_own() -> None:
    """And the words of a chip's own links mean the same where the chip is in no table."""
    common = {"pcie", "roce", "infiniband", "tcp"}
    for table in map(descriptors, VENDORS):
        for chip in table.chips:
            for link in chip.links:
                if link.kind not in common:
                    assert [table.private_links.get(word) for word in link.cells] == [link.kind] * len(
                        link.cells
                    )


def test_a_measured_fact_keeps_the_table_s_value() -> None:
    table = Fact[float](value=63e9, source="a data sheet")
    once = table.overridden(48e9, "timed")
    twice = once.overridden(50e9, "timed again")
    assert (once.value, once.measured, once.table_value) == (48e9, True, 63e9)
    assert (twice.value, twice.table_value) == (50e9, 63e9)
