# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench device --count``: what hand-overs ask of emulated devices."""

from __future__ import annotations

import ctypes

import pytest

from sage_kv_connector.bench.device_count import CASES, count_device, count_rows
from sage_kv_connector.kernels.common.launch import Launch
from sage_kv_connector.vendors import VENDORS
from sage_kv_connector.vendors.emulator.settings import DIRECTIONS
from tests.vendors.kernels import VENDORS_OF_KERNELS
from tests.vendors.rig import Rig, expected

TOKENS, LAYERS = 256, 2


@pytest.mark.parametrize("vendor", [name for name in VENDORS if name not in VENDORS_OF_KERNELS])
def test_every_vendor_is_counted(vendor: str) -> None:
    result = count_device(vendor, [case for case in CASES if case.name == "staged fp8"], TOKENS, LAYERS)
    assert result["verified"] and result["emulated"] and vendor == result["vendor"]
    prefill = result["cases"]["staged fp8"]["prefill"]
    assert prefill["launches"] == prefill["parts"] > 0


@pytest.mark.parametrize("vendor", VENDORS_OF_KERNELS)
def test_every_case_is_right_and_its_bytes_are_counted(vendor: str) -> None:
    result = count_device(vendor, tokens=TOKENS, layers=LAYERS)
    assert result["verified"] and result["emulated"]
    cases = result["cases"]
    assert list(cases) == [case.name for case in CASES]
    direct = cases["direct"]
    assert direct["wire_dtype"] == "same"
    assert direct["decode"]["d2d"]["bytes"] == result["kv_bytes"]
    reads = Rig(vendor).runtime.features.kernels_read_peers
    for name in ("direct 16 to 64", "direct fp8", "direct int4") if reads else ():
        prefill, decode = cases[name]["prefill"], cases[name]["decode"]
        assert cases[name]["mode"] == "read"
        # All that the prefill side's device is asked for is to leave its pages alone; nothing passes the host.
        assert not any(prefill[way]["calls"] for way in DIRECTIONS)
        assert (prefill["parts"], prefill["launches"]) == (0, 0)
        assert decode["launches"] == 2 * decode["parts"] > 0
        arguments = decode["launches"] if expected(vendor).get("argument_copies") else 0
        assert decode["h2d"]["bytes"] == arguments * ctypes.sizeof(Launch)
        assert [decode[way]["calls"] for way in DIRECTIONS] == [arguments, 0, 0, 0]
        assert cases[name]["wire_bytes"] == result["kv_bytes"]
    for name in ("staged equal", "staged 16 to 64", "staged fp8", "staged int4"):
        assert cases[name]["mode"] != "read"
        prefill, decode = cases[name]["prefill"], cases[name]["decode"]
        assert prefill["parts"] == decode["parts"] > 0
        for side, way in ((prefill, "d2h"), (decode, "h2d")):
            arguments = side["launches"] if expected(vendor).get("argument_copies") and way == "h2d" else 0
            assert side["launches"] == side["parts"]
            assert side[way]["calls"] == side[way]["copies"] == side["parts"] + arguments
            assert side[way]["bytes"] == cases[name]["wire_bytes"] + arguments * ctypes.sizeof(Launch)
    assert cases["staged int4"]["wire_bytes"] < result["kv_bytes"] / 3
    assert len(list(count_rows(result))) == 3 * len(CASES) + 3
