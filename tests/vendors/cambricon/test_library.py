# SPDX-License-Identifier: Apache-2.0
"""What CNDrv is asked of a real device, by answers in its place; and where its functions come from."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sage_kv_connector.devices.runtime import RuntimeUnavailable
from sage_kv_connector.engine.conversion.device_kernels import DeviceKernels
from sage_kv_connector.vendors.cambricon.abi import CNDRV, CNRT
from sage_kv_connector.vendors.cambricon.runtime import CONSTANT, CambriconRuntime
from sage_kv_connector.vendors.common.libraries import load_vendor_library
from tests.vendors.rig import emulator_of


@pytest.mark.parametrize(("isa", "clusters", "architecture"), [(592, 1, "mtp_592"), (322, 0, "tp_322")])
def test_kernels_are_compiled_for_the_instruction_set(isa: int, clusters: int, architecture: str) -> None:
    library = emulator_of("cambricon")
    parts = {
        CONSTANT["CN_DEVICE_ATTRIBUTE_MLU_ISA_VERSION"]: isa,
        CONSTANT["CN_DEVICE_ATTRIBUTE_IS_MULTIPLE_TENSOR_PROCESSOR"]: clusters,
    }

    def attribute(out: Any, which: int, device: ctypes.c_uint64) -> int:
        assert device.value == 1
        out._obj.value = parts[which]
        return 0

    functions = library.functions | {"cnDeviceGetAttribute": attribute}
    runtime = CambriconRuntime(replace(library, functions=functions, emulator=None))
    assert runtime.architecture(1) == architecture


@pytest.mark.parametrize("lost", CNDRV)
def test_without_the_driver_s_functions_there_are_no_kernels(lost: str) -> None:
    library = emulator_of("cambricon")
    functions = {name: call for name, call in library.functions.items() if name != lost}
    runtime = CambriconRuntime(replace(library, functions=functions, emulator=None))
    assert not runtime.features.kernels
    kernels = DeviceKernels(runtime, 0, "bf16", ())
    assert kernels.lacks == f"{runtime.api} launches no kernels"


def libraries(folder: Path, **sources: str) -> None:
    for name, source in sources.items():
        (folder / "source.cc").write_text(f'extern "C" {{ {source} }}')
        made = folder / f"lib{name}.so"
        command = ["c++", "-shared", "-fPIC", "-o", str(made), str(folder / "source.cc")]
        subprocess.run(command, check=True)


def test_functions_of_a_second_library(tmp_path: Path) -> None:
    interface = replace(
        CNRT, sonames=("libfirst.so",), companions=("libnone.so", "libsecond.so"), folders=(str(tmp_path),),
        types={}, declarations="int both(void); int one(void); int two(void);", optional=frozenset({"two"}),
    )  # fmt: skip
    libraries(tmp_path, first="int both() { return 1; } int one() { return 1; }")
    assert set(load_vendor_library(interface).functions) == {"both", "one"}
    libraries(tmp_path, second="int both() { return 2; } int two() { return 2; }")
    functions = load_vendor_library(interface).functions
    assert {name: call() for name, call in functions.items()} == {"both": 1, "one": 1, "two": 2}
    with pytest.raises(RuntimeUnavailable, match="CNRT has no function three"):
        load_vendor_library(replace(interface, declarations="int three(void);"))
