# SPDX-License-Identifier: Apache-2.0
"""The CUDA and HIP kernels through their compilers, where these are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from sage_kv_connector.kernels.cuda.launch import TYPE_NAMES, WIRE_TYPE_NAMES
from tests.kernels.tiles import KERNELS

CUDA = KERNELS / "cuda"
#: One memory dtype a source keeps this short; the others are the same templates.
CASES = [
    ("fp8_convert.cu", "bf16", "fp8_e4m3"),
    ("fp8_convert.cu", "fp8_e5m2", "fp16"),
    ("int4_pack.cu", "bf16", "int4"),
]


def one_pair(memory: str, wire: str) -> list[str]:
    return [
        f"-DKV_MEMORY={memory}", f"-DKV_MEMORY_TYPE={TYPE_NAMES[memory]}",
        f"-DKV_WIRE={wire}", f"-DKV_WIRE_TYPE={WIRE_TYPE_NAMES[wire]}",
    ]  # fmt: skip


def compiled(command: list[str], output: Path, **environment: str) -> bytes:
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return output.read_bytes()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("source", "memory", "wire"), CASES)
def test_nvcc(source: str, memory: str, wire: str, arch: str, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    output = tmp_path / "kernel.cubin"
    command = [
        "nvcc",
        "-std=c++17",
        f"-arch={arch}",
        "-Werror",
        "all-warnings",
        "-cubin",
        *one_pair(memory, wire),
    ]
    code = compiled([*command, "-o", str(output), str(CUDA / source)], output)
    assert f"kv_encode_{memory}_{wire}".encode() in code
    assert f"kv_decode_{memory}_{wire}".encode() in code


@pytest.mark.parametrize("arch", ["gfx906", "gfx90a"])
@pytest.mark.parametrize(("source", "memory", "wire"), CASES)
def test_hipcc(source: str, memory: str, wire: str, arch: str, tmp_path: Path) -> None:
    if shutil.which("hipcc") is None:
        pytest.skip("hipcc is not installed")
    output = tmp_path / "kernel.hsaco"
    command = [
        "hipcc",
        "-std=c++17",
        "-O3",
        "--genco",
        f"--offload-arch={arch}",
        "-ffp-contract=off",
        "-Wall",
        "-Werror",
    ]
    command += ["-x", "hip", *one_pair(memory, wire), "-o", str(output), str(CUDA / source)]
    code = compiled(command, output, HIP_PLATFORM="amd")
    assert f"kv_encode_{memory}_{wire}".encode() in code
    assert f"kv_decode_{memory}_{wire}".encode() in code
