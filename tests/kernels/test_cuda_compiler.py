# SPDX-License-Identifier: Apache-2.0
"""What CUDA's and HIP's kernels are compiled from and launched with; what is said where something is missing."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from sage_kv_connector.kernels.common.launch import Launch, LaunchPlane, LayerPlane
from sage_kv_connector.kernels.cuda import compiler
from sage_kv_connector.kernels.registry import KernelsUnavailable
from tests.kernels.tiles import KERNELS


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
