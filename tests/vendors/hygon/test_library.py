# SPDX-License-Identifier: Apache-2.0
"""HIP's own library, where one is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from sage_kv_connector.devices.runtime import DeviceError
from sage_kv_connector.vendors import open_runtime
from tests.vendors.rig import loads


def test_the_real_hip_library_without_a_device() -> None:
    """Debian's libamdhip64 is a real HIP: loads, binds every function, and answers that there is no device."""
    if not loads("hygon"):
        pytest.skip("no HIP library is installed (Debian: libamdhip64-5)")
    runtime = open_runtime("hygon")
    assert not runtime.emulated
    assert "emulated" not in runtime.api
    if Path("/dev/kfd").exists():
        pytest.skip("this machine may have a device")
    with pytest.raises(DeviceError) as caught:
        runtime.device_count()
    assert (caught.value.call, caught.value.name) == ("hipGetDeviceCount", "hipErrorNoDevice")
    assert caught.value.detail  # the library's own words
