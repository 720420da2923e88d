# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from sage_kv_connector.vendors import VENDORS
from tests.vendors.rig import Rig


@pytest.fixture(params=VENDORS)
def vendor(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def rig(vendor: str) -> Rig:
    """Two devices of 1 MiB that reach each other, no limits."""
    return Rig(vendor, memory_bytes=1 << 20)
