# SPDX-License-Identifier: Apache-2.0
"""The short form of ``two_links``; by itself it does as many rounds as one likes."""

from __future__ import annotations

import os
import shutil

import pytest

from sage_kv_connector.bench.ab.links import LinkError
from scripts.two_links import rounds_of


def test_a_link_that_goes_down_costs_no_byte() -> None:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("two hosts want root and iproute2")
    try:
        found = rounds_of(8, 200, seed=1)
    except LinkError as error:
        pytest.skip(str(error))
    assert (found["rounds"], found["wrong"]) == (8, 0)
    assert found["seconds"]["both"] < found["seconds"]["one goes down"] < 10
