# SPDX-License-Identifier: Apache-2.0
"""HIP's own library, where one is installed, and answers in its place."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sage_kv_connector.devices.runtime import DeviceError, UnsupportedByRuntime
from sage_kv_connector.vendors import open_runtime
from sage_kv_connector.vendors.hygon.runtime import HygonRuntime
from tests.vendors.rig import emulator_of, loads


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
    with pytest.raises(DeviceError) as caught:
        runtime.architecture(0)
    assert caught.value.call == "hipGetDeviceProperties"


@pytest.mark.parametrize("place", [396, 1160])  # of gcnArchName, in HIP 5.2 and in 7.1
def test_kernels_are_compiled_for_the_gfx_name(place: int) -> None:
    answers = {0: b"gfx906:sramecc+:xnack-", 1: b"gfx936", 2: b"DCU"}

    def properties(out: Any, device: int) -> int:
        start = ctypes.addressof(out._obj)
        ctypes.memmove(start, b"DCU K100", 9)  # the card's name comes first
        ctypes.memmove(start + place, answers[device], len(answers[device]) + 1)
        return 0

    library = emulator_of("hygon")
    functions = library.functions | {"hipGetDeviceProperties": properties}
    runtime = HygonRuntime(replace(library, functions=functions, emulator=None))
    assert [runtime.architecture(device) for device in (0, 1)] == ["gfx906", "gfx936"]
    with pytest.raises(UnsupportedByRuntime, match="no gfx name of device 2"):
        runtime.architecture(2)
    with pytest.raises(UnsupportedByRuntime, match="no such function"):
        HygonRuntime(replace(library, emulator=None)).architecture(0)
