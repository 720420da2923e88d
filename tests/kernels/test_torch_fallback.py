# SPDX-License-Identifier: Apache-2.0
"""Plain torch operations against the golden vectors and the reference; which kernels a device gets."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_kv_connector.contract.dtypes import CONVERTIBLE_DTYPES
from sage_kv_connector.format.wire_format import WireFormat
from sage_kv_connector.kernels.plane import KVPlane, Range
from sage_kv_connector.kernels.registry import kernels_for
from tests.kernels.tiles import check_kernels_on_golden_vectors, check_kernels_on_pages, formats

torch = pytest.importorskip("torch")


def test_golden_vectors() -> None:
    check_kernels_on_golden_vectors(kernels_for("cpu"), "cpu")


@settings(max_examples=100)
@given(seed=st.integers(0, 2**32), fmt=formats(), dtype=st.sampled_from(CONVERTIBLE_DTYPES))
def test_random_pages(seed: int, fmt: WireFormat, dtype: str) -> None:
    check_kernels_on_pages(kernels_for("cpu"), "cpu", seed, fmt, dtype)


def test_engine_dtypes() -> None:
    pages = torch.randn(4, 8, 2, 16).to(torch.float8_e4m3fn)
    plane = KVPlane(pages, [2, 0], "fp8_e4m3")
    other = KVPlane(torch.zeros(4, 8, 2, 16, dtype=torch.bfloat16), [1, 3], "bf16")
    spans, fmt, kernels = (Range(3, 9), Range(1, 1)), WireFormat("bf16"), kernels_for("npu")
    kernels.decode(kernels.encode(plane, *spans, fmt), other, *spans, fmt)
    assert kernels.name == "torch on npu"
    assert torch.equal(other.pages[1, 3:, 1].float(), pages[2, 3:, 1].float())
    assert torch.equal(other.pages[3, :4, 1].float(), pages[0, :4, 1].float())
    assert not other.pages[:, :, 0].any() and not other.pages[1, :3].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int8"}, "memory dtype is 'int8'"),
        ({"memory_scale": 0.5}, "memory of bf16 has none"),
        ({"wire_scale": 0.0}, "wire_scale is 0.0"),
        ({"block_table": [0]}, "need 2 pages, the block table has 1"),
        ({"block_table": [0, 4]}, "outside of the plane's 4 pages"),
    ],
)
def test_refused_planes(change: dict[str, Any], message: str) -> None:
    plane = KVPlane(torch.zeros(4, 8, 2, 16, dtype=torch.bfloat16), [0, 1], "bf16")
    with pytest.raises(ValueError, match=message):
        kernels_for("cpu").encode(plane._replace(**change), Range(0, 9), Range(0, 2), WireFormat("bf16"))


def test_refused_requests() -> None:
    plane = KVPlane(torch.zeros(4, 8, 2, 16, dtype=torch.bfloat16), [0, 1], "bf16")
    kernels, fmt = kernels_for("cpu"), WireFormat("bf16")
    with pytest.raises(ValueError, match="rotate"):
        kernels.encode(plane, Range(0, 9), Range(0, 2), WireFormat("int4", "head", rotate=True))
    with pytest.raises(ValueError, match="the plane has 2"):
        kernels.encode(plane, Range(0, 9), Range(1, 2), fmt)
    with pytest.raises(ValueError, match="wire has 16 bytes"):
        kernels.decode(torch.zeros(16, dtype=torch.uint8), plane, Range(0, 9), Range(0, 2), fmt)


def test_registry_loads_no_torch() -> None:
    code = "import sys, sage_kv_connector.kernels.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
