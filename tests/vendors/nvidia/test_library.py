# SPDX-License-Identifier: Apache-2.0
"""What the driver is asked of a real device, by answers in its place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sage_kv_connector.vendors.nvidia.runtime import CONSTANT, NvidiaRuntime
from tests.vendors.rig import emulator_of


def test_kernels_are_compiled_for_the_compute_capability() -> None:
    library = emulator_of("nvidia")
    parts = {
        CONSTANT["CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR"]: (9, 12),
        CONSTANT["CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR"]: (0, 1),
    }

    def attribute(out: Any, which: int, device: int) -> int:
        out._obj.value = parts[which][device]
        return 0

    functions = library.functions | {"cuDeviceGetAttribute": attribute}
    runtime = NvidiaRuntime(replace(library, functions=functions, emulator=None))
    assert [runtime.architecture(device) for device in (0, 1)] == ["sm_90", "sm_121"]
