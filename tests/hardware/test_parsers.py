# SPDX-License-Identifier: Apache-2.0
"""Every parser on every format that is known, and on what drivers may make of them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_kv_connector.hardware.probing.tool_output import (
    ToolFormatError,
    parse_json,
    parse_matrix,
    pci_address,
)
from sage_kv_connector.hardware.report.measure_rdma import parse_perftest
from sage_kv_connector.vendors import VENDORS

VENDORS_OWN = [import_module(f"tests.vendors.{vendor}.samples") for vendor in VENDORS]
SAMPLES: dict[str, tuple[Callable[[str], Any], str]] = {
    name: sample for own in VENDORS_OWN for name, sample in own.SAMPLES.items()
}
CLOSED = {name: mark for own in VENDORS_OWN for name, mark in own.CLOSED.items()}


@pytest.mark.parametrize("name", SAMPLES)
def test_every_sample_is_there_and_read(name: str) -> None:
    parse, text = SAMPLES[name]
    assert text
    assert parse(text)


@given(name=st.sampled_from(sorted(SAMPLES)), cut=st.floats(0, 1))
def test_cut_output_is_read_or_named(name: str, cut: float) -> None:
    parse, text = SAMPLES[name]
    try:
        parse(text[: int(len(text) * cut)])
    except ToolFormatError as error:
        assert "expected" in str(error)


@given(name=st.sampled_from(sorted(SAMPLES)), data=st.data())
def test_spoilt_output_is_read_or_named(name: str, data: st.DataObject) -> None:
    parse, text = SAMPLES[name]
    lines = text.splitlines()
    at = data.draw(st.integers(0, len(lines) - 1))
    lines[at] = data.draw(
        st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=120)
    )
    try:
        parse("\n".join(lines))
    except ToolFormatError as error:
        assert error.expected


@given(st.text(max_size=400))
def test_any_text_is_read_or_named(text: str) -> None:
    for parse, _ in SAMPLES.values():
        try:
            parse(text)
        except ToolFormatError:
            pass


@pytest.mark.parametrize("name", CLOSED)
def test_a_table_that_ends_too_early_is_no_smaller_machine(name: str) -> None:
    parse, text = SAMPLES[name]
    lines = text.splitlines()
    third = [at for at, line in enumerate(lines) if CLOSED[name] in line]
    with pytest.raises(ToolFormatError, match="closing line"):
        parse("\n".join(lines[: third[2] + 1]))


@pytest.mark.parametrize(
    ("parse", "text", "says"),
    [
        *(case for own in VENDORS_OWN for case in own.UNREADABLE),
        (
            lambda text: parse_matrix("t", text, "GPU"),
            "     GPU0  GPU1\nGPU0  X  NV4\nGPU1  NV4\n",
            "line 3: 'GPU1  NV4': expected 2 cells after GPU1",
        ),
        (
            lambda text: parse_matrix("t", text, "GPU"),
            "     GPU0  GPU1\nGPU0  X  NV4\n",
            "line 2: .* expected a row of GPU1 after it",
        ),
        (
            lambda text: parse_matrix("t", text, "GPU"),
            "     GPU0  GPU1\nGPU0  X  ???\nGPU1  NV4  X\n",
            "line 2.*column GPU1, not '\\?\\?\\?'",
        ),
        (lambda text: parse_json("t", text), "{'card0': 1}\n", "line 1.*JSON"),
        (lambda text: parse_json("t", text), "no devices\n", "line 1: 'no devices': expected a JSON object"),
    ],
)
def test_what_can_t_be_read_is_named(parse: Callable[[str], Any], text: str, says: str) -> None:
    with pytest.raises(ToolFormatError, match=says):
        parse(text)


@given(extra=st.lists(st.sampled_from(["PCIe Affinity", "Health State", "Fabric NUMA"]), unique=True))
def test_columns_beside_a_matrix_come_and_go(extra: list[str]) -> None:
    header = "\t".join(["", "GPU0", "GPU1", "CPU Affinity", "NUMA Affinity", *extra])
    rows = [
        "\t".join(["GPU0", " X ", "NV4", "0-7", "0", *extra]),
        "\t".join(["GPU1", "NV4", " X ", "8-15", "1", *extra]),
    ]
    matrix = parse_matrix("t", "\n".join([header, *rows]), "GPU")
    assert matrix.cells["GPU0", "GPU1"] == "NV4"
    assert matrix.extras["GPU1"]["NUMA Affinity"] == "1"


def test_blank_cells_beside_a_matrix_are_not_shifted() -> None:
    header = "\tGPU0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
    assert parse_matrix("t", header + "GPU0\t X \t\t1\tN/A\n", "GPU").extras["GPU0"] == {}
    kept = parse_matrix("t", header + "GPU0\t X \t0-7,9\t\tN/A\n", "GPU").extras["GPU0"]
    assert kept == {"CPU Affinity": "0-7,9"}
    doubled = parse_matrix("t", header + "GPU0\t X \t0-7\t1\t\tN/A\n", "GPU").extras["GPU0"]
    assert doubled["NUMA Affinity"] == "1"  # newer drivers put two tabs there


def test_a_matrix_of_one_device_has_a_header() -> None:
    matrix = parse_matrix("t", "\tNPU0\tCPU Affinity\nNPU0\tX\t0-23\n", "NPU")
    assert matrix.extras == {"NPU0": {"CPU Affinity": "0-23"}}
    assert (
        parse_matrix("t", "\tGPU0\tNIC0\tCPU Affinity\nGPU0\tX\tPIX\t0-7\n", "GPU").cells["GPU0", "NIC0"]
        == "PIX"
    )


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("00000000:1B:00.0", "0000:1b:00.0"),
        ("0000:C1:00.0", "0000:c1:00.0"),
        ("3b:00.1", "0000:3b:00.1"),
        ("00010000:01:00.0", "10000:01:00.0"),
        ("NA", None),
        ("0000:C1:00", None),
    ],
)
def test_pci_addresses(text: str, address: str | None) -> None:
    assert pci_address(text) == address


PERFTEST_BW = """\
---------------------------------------------------------------------------------------
                    RDMA_Write BW Test
 Dual-port       : OFF          Device         : rxe0
---------------------------------------------------------------------------------------
 #bytes     #iterations    BW peak[Gb/sec]    BW average[Gb/sec]   MsgRate[Mpps]
 1048576    1000             11.83              11.52                0.001373
---------------------------------------------------------------------------------------
"""
PERFTEST_LAT = """\
#bytes #iterations  t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]    t_stdev[usec]  99% percentile[usec]
 8       1000          2.11           9.04         2.26               2.31           0.19            3.02
"""


def test_perftest_columns_are_found_by_name() -> None:
    assert parse_perftest("t", PERFTEST_BW, "BW average[Gb/sec]") == 11.52
    assert parse_perftest("t", PERFTEST_LAT, "t_typical[usec]") == 2.26
    assert parse_perftest("t", PERFTEST_LAT, "99% percentile[usec]") == 3.02
    with pytest.raises(ToolFormatError, match="a column"):
        parse_perftest("t", PERFTEST_LAT, "BW average[Gb/sec]")
    with pytest.raises(ToolFormatError, match="#bytes"):
        parse_perftest("t", "Couldn't connect\n", "t_typical[usec]")
