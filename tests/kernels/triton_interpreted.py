# SPDX-License-Identifier: Apache-2.0
"""Run by test_triton.py with TRITON_INTERPRET=1, which Triton reads when it is imported."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sage_kv_connector.contract.dtypes import CONVERTIBLE_DTYPES
from sage_kv_connector.format.wire_format import WireFormat
from sage_kv_connector.kernels.triton.kernels import Kernels
from tests.kernels.tiles import check_kernels_on_golden_vectors, check_kernels_on_pages, formats


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), fmt=formats(), dtype=st.sampled_from(CONVERTIBLE_DTYPES))
def random_pages(seed: int, fmt: WireFormat, dtype: str) -> None:
    check_kernels_on_pages(Kernels("cpu"), "cpu", seed, fmt, dtype)


if __name__ == "__main__":
    check_kernels_on_golden_vectors(Kernels("cpu"), "cpu")
    random_pages()
