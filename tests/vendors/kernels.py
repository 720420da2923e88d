# SPDX-License-Identifier: Apache-2.0
"""The tests' own kernel, compiled for what a runtime says."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from sage_kv_connector.devices.runtime import DeviceRuntime
from sage_kv_connector.kernels.registry import BY_ADDRESS
from tests.vendors.rig import Rig, expected

#: One vendor of each set of kernels that are launched by address.
VENDORS_OF_KERNELS = tuple({room: vendor for vendor, room in reversed(BY_ADDRESS.items())}.values())
SOURCE = Path(__file__).parent / "add_words.cu"


def compiler_for(architecture: str) -> list[str]:
    """The command that makes a module of ``SOURCE``; its first word may not be installed."""
    if architecture.startswith("sm_"):
        return ["nvcc", "-cubin", f"-arch={architecture}"]
    if architecture.startswith("gfx"):
        return ["hipcc", "-x", "hip", "--genco", f"--offload-arch={architecture}"]
    if architecture.startswith(("mtp_", "tp_")):
        return ["cncc", "-x", "bang", "-DBANG", "--bang-fatbin-only", f"--bang-mlu-arch={architecture}"]
    if architecture.startswith("xpu"):
        return ["no compiler makes a module of it in one step"]
    assert architecture == "host"
    return [os.environ.get("CXX") or "c++", "-x", "c++", "-std=c++17", "-O1", "-fPIC", "-shared"]


@functools.cache
def module_for(architecture: str) -> bytes:
    command = compiler_for(architecture)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "module")
        subprocess.run(
            [*command, "-o", str(made), str(SOURCE)], check=True, env=os.environ | {"HIP_PLATFORM": "amd"}
        )
        return made.read_bytes()


def can_compile(architecture: str) -> bool:
    return shutil.which(compiler_for(architecture)[0]) is not None


def argument(words: int, count: int, added: int, awaited: int = 0) -> bytes:
    """``Argument`` of the source; addresses of ``count`` uint32 and, or 0, of one that is waited for."""
    return np.array([words, count, awaited, added], np.uint64).tobytes()


class Adder:
    """The kernel on one device."""

    def __init__(self, runtime: DeviceRuntime, device: int = 0) -> None:
        self.runtime, self.device = runtime, device
        self.module = module_for(runtime.architecture(device))
        self.function = runtime.load_function(device, self.module, "add_words")

    def launch(self, given: bytes, stream: int) -> None:
        threads = min(64, shape_of(self.runtime.vendor)[1])
        self.runtime.launch(self.device, (self.function, (4, 1), threads, 0, given), stream)


def shape_of(vendor: str) -> tuple[tuple[int, int], int, int]:
    """A launch that a vendor takes, as large as a test likes in each way: blocks, threads, shared bytes."""
    columns, rows, threads, shared_bytes = expected(vendor).get("launch_shape", [70000, 2, 96, 4096])
    return (columns, rows), threads, shared_bytes


def words_of(memory: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    return memory.view(np.uint32)


def kernel_rig(vendor: str) -> Rig:
    """Two devices of 1 MiB whose vendor's runtime launches kernels; skips the test where it does not."""
    rig = Rig(vendor, memory_bytes=1 << 20)
    if not rig.runtime.features.kernels:
        pytest.skip(f"no kernels are launched through {rig.runtime.api}")
    return rig


def wait(rig: Rig, stream: int) -> None:
    """For the work of a stream, but not for ever: a kernel may wait for another one that never begins."""
    event, until = rig.marked(stream), time.monotonic() + 30
    while not rig.runtime.event_query(0, event):
        assert time.monotonic() < until, "the kernel does not end"
        time.sleep(0.001)
