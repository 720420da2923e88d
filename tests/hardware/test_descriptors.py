# SPDX-License-Identifier: Apache-2.0
"""The tables of chips, and the documents made from them."""

from __future__ import annotations

import pytest

from sage_kv_connector.hardware.probing.accelerator_descriptor import Fact, LinkKind
from sage_kv_connector.hardware.probing.profile import published_schema, schema
from sage_kv_connector.hardware.report.descriptors import all_descriptors, descriptors, find_descriptor
from sage_kv_connector.vendors import VENDORS
from scripts.hardware_documents import MATRIX, matrix


def test_documents_are_current() -> None:
    assert published_schema() == schema(), "run python -m scripts.hardware_documents"
    assert MATRIX.read_text() == matrix(), "run python -m scripts.hardware_documents"


def test_every_chip_has_a_host_link_and_one_name() -> None:
    names = [chip.chip for table in all_descriptors() for chip in table.chips]
    assert len(names) == len(set(names))
    for table in all_descriptors():
        assert table.vendor in VENDORS and table.checked_on
        ids = [one for chip in table.chips for one in chip.pci_devices]
        assert len(ids) == len(set(ids)), table.vendor
        for chip in table.chips:
            assert chip.link(LinkKind.pcie) is not None, chip.chip
            words = [word for link in chip.links for word in link.cells]
            assert len(words) == len(set(words)), chip.chip


def test_the_pci_id_decides_before_the_name() -> None:
    found = find_descriptor("ascend", "d803", "Ascend910")
    assert found is not None and found.chip == "Ascend 910C"
    by_name = find_descriptor("ascend", None, "910B3")
    assert by_name is not None and by_name.chip == "Ascend 910B"
    assert find_descriptor("nvidia", "ffff", "something new") is None
    k100 = find_descriptor("hygon", None, "K100_AI")
    assert k100 is not None and k100.chip == "DCU K100_AI"
    with pytest.raises(ValueError, match="vendor 'acme' has no descriptor; allowed: ascend"):
        descriptors("acme")


def test_a_measured_fact_keeps_the_table_s_value() -> None:
    table = Fact[float](value=63e9, source="a data sheet")
    once = table.overridden(48e9, "timed")
    twice = once.overridden(50e9, "timed again")
    assert (once.value, once.measured, once.table_value) == (48e9, True, 63e9)
    assert (twice.value, twice.table_value) == (50e9, 63e9)
