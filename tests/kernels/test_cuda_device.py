# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on a device where there is one; what is said where something is missing."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_kv_connector.contract.dtypes import CONVERTIBLE_DTYPES
from sage_kv_connector.format.wire_format import WireFormat
from sage_kv_connector.kernels.common.launch import Launch, LaunchPlane, LayerPlane
from sage_kv_connector.kernels.cuda import compiler
from sage_kv_connector.kernels.registry import DeviceKernels, KernelsUnavailable, kernels_for
from tests.kernels.tiles import KERNELS, check_kernels_on_golden_vectors, check_kernels_on_pages, formats

torch = pytest.importorskip("torch")


def test_structures_match_the_header() -> None:
    assert [ctypes.sizeof(each) for each in (LayerPlane, LaunchPlane, Launch)] == [16, 56, 4064]


def test_compiler_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAGE_KVT_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(compiler, "NVRTC", ("libnvrtc-none.so",))
    with pytest.raises(KernelsUnavailable, match=r"nvcc is not installed, and none of libnvrtc-none\.so"):
        compiler.compiled("bf16", "int4", "sm_90")
    with pytest.raises(KernelsUnavailable, match="hipcc is not installed"):
        compiler.compiled("bf16", "int4", "gfx906")


def test_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAGE_KVT_CACHE", str(tmp_path))
    calls: list[str] = []
    environments: list[dict[str, str]] = []

    def command(name: str, *_: object, **environment: str) -> bytes:
        calls.append(name)
        environments.append(environment)
        return b"code"

    monkeypatch.setattr(compiler, "run_compiler", command)
    assert [compiler.compiled("bf16", "fp16", "gfx906") for _ in range(2)] == [b"code"] * 2
    assert calls == ["hipcc"] and environments == [{"HIP_PLATFORM": "amd"}]
    assert (KERNELS / "cuda" / "fp8_convert.cu").exists()


NO_DEVICE = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def device_kernels() -> DeviceKernels:
    kernels = kernels_for("hip" if torch.version.hip else "cuda")
    assert kernels.name in ("cuda", "hip")
    return kernels


@NO_DEVICE
def test_golden_vectors_on_device() -> None:
    check_kernels_on_golden_vectors(device_kernels(), "cuda")


@NO_DEVICE
@settings(max_examples=100)
@given(seed=st.integers(0, 2**32), fmt=formats(), dtype=st.sampled_from(CONVERTIBLE_DTYPES))
def test_random_pages_on_device(seed: int, fmt: WireFormat, dtype: str) -> None:
    check_kernels_on_pages(device_kernels(), "cuda", seed, fmt, dtype)
