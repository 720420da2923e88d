# SPDX-License-Identifier: Apache-2.0
"""The CUDA, HIP, Ascend C, BANG C and XPU C++ kernels through their compilers, where these are installed."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from sage_kv_connector.kernels.ascend import compiler as ascend_compiler
from sage_kv_connector.kernels.ascend.compiler import compiled as compile_ascend
from sage_kv_connector.kernels.cambricon import compiler as bang_compiler
from sage_kv_connector.kernels.cambricon.compiler import compiled as compile_bang
from sage_kv_connector.kernels.common.launch import TYPE_NAMES, WIRE_TYPE_NAMES
from sage_kv_connector.kernels.cuda import compiler as cuda_compiler
from sage_kv_connector.kernels.kunlunxin import compiler as xpu_compiler
from sage_kv_connector.kernels.kunlunxin.compiler import compiled as compile_xpu
from sage_kv_connector.kernels.registry import KernelsUnavailable
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


def test_cncc_makes_a_fat_binary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a stand-in for it is asked; the real one was never at hand."""
    stand_in = tmp_path / "cncc"
    stand_in.write_text('#!/bin/sh\nall="$*"\nwhile [ "$1" != -o ]; do shift; done\necho "$3 $all" > "$2"\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("SAGE_KVT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(KernelsUnavailable, match="cncc is not installed"):
        compile_bang("bf16", "int4", "mtp_592")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    made = compile_bang("bf16", "int4", "mtp_592")
    source, *given = made.decode().split()
    assert source.endswith("kernels/cambricon/bang_kernel.mlu")
    for option in ("--bang-fatbin-only", "--bang-mlu-arch=mtp_592", "-DKV_WIRE_TYPE=Int4Wire"):
        assert option in given
    stand_in.unlink()
    assert compile_bang("bf16", "int4", "mtp_592") == made  # kept
    with pytest.raises(KernelsUnavailable, match="cncc is not installed"):
        compile_bang("bf16", "int4", "mtp_372")


@pytest.mark.parametrize("arch", ["mtp_372", "mtp_592"])
@pytest.mark.parametrize("wire", ["bf16", "fp8_e4m3", "int4"])
def test_cncc(wire: str, arch: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if shutil.which("cncc") is None:
        pytest.skip("cncc is not installed")
    monkeypatch.setenv("SAGE_KVT_CACHE", str(tmp_path))
    assert f"kv_encode_bf16_{wire}".encode() in compile_bang("bf16", wire, arch)


def test_cann_compiles_and_links(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What stand-ins for its tools are asked; the real ones were never at hand."""
    tools = tmp_path / "toolkit" / ascend_compiler.TOOLS
    tools.mkdir(parents=True)
    (tmp_path / "toolkit" / "asc" / "include").mkdir(parents=True)
    monkeypatch.setenv("SAGE_KVT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "toolkit"))
    with pytest.raises(KernelsUnavailable, match="ccec of CANN is not installed"):
        compile_ascend("bf16", "int4", "dav-c220-vec")
    (tools / "ccec").write_text(CLANG)
    (tools / "ld.lld").write_text(
        '#!/bin/sh\nall="$*"\nwhile [ "$1" != -o ]; do shift; done\necho "$all" >> "$3"; cp "$3" "$2"\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    made = compile_ascend("bf16", "int4", "dav-c220-vec")
    compiled_by, linked_by = made.decode().splitlines()
    source, *given = compiled_by.split()
    assert source.endswith("kernels/ascend/ascend_kernel.cc")
    wanted = {"--cce-aicore-only", "--cce-aicore-arch=dav-c220-vec", "-DKV_WIRE_TYPE=Int4Wire"}
    assert wanted | {f"-I{tmp_path / 'toolkit' / 'asc' / 'include'}"} <= set(given)
    assert linked_by.startswith("-m aicorelinux -Ttext=0 -static")
    (tools / "ccec").unlink()
    assert compile_ascend("bf16", "int4", "dav-c220-vec") == made  # kept


#: Stand-ins for XTDK's tools; where elfconv puts its result differs between releases.
CLANG = '#!/bin/sh\nall="$*"\nwhile [ "$1" != -o ]; do shift; done\necho "$3 $all" > "$2"\n'
IN_PLACE = '[ -x "$3/clang" ] && cp "$1" "$2"\n'
BESIDE = 'printf "\\177ELF" > "$2"; cp "$1" "$2.bin"\n'
NOTHING = 'printf "\\177ELF" > "$2"\n'


@pytest.mark.parametrize("elfconv", [IN_PLACE, BESIDE])
def test_xtdk_makes_the_code_of_two_kernels(
    elfconv: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What stand-ins for its tools are asked; the real ones were never at hand."""
    monkeypatch.setenv("SAGE_KVT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(KernelsUnavailable, match="xpu3-elfconv of XTDK is not installed"):
        compile_xpu("bf16", "int4", "xpu3")
    for name, text in (("clang", CLANG), ("xpu3-elfconv", elfconv)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    made = compile_xpu("bf16", "int4", "xpu3")
    with zipfile.ZipFile(io.BytesIO(made)) as image:
        codes = {name: image.read(name).decode().split() for name in image.namelist()}
    assert list(codes) == ["kv_encode_bf16_int4", "kv_decode_bf16_int4"]
    for verb, encodes in (("encode", "true"), ("decode", "false")):
        source, *given = codes[f"kv_{verb}_bf16_int4"]
        assert source.endswith("kernels/kunlunxin/xpu_kernel.xpu")
        wanted = {"--xpu-arch=xpu3", "--xpu-device-only", f"-DKV_VERB={verb}", f"-DKV_ENCODE={encodes}"}
        assert wanted | {"-DKV_WIRE_TYPE=Int4Wire"} <= set(given)
    (tmp_path / "xpu3-elfconv").unlink()
    assert compile_xpu("bf16", "int4", "xpu3") == made  # kept
    with pytest.raises(KernelsUnavailable, match="xpu2-elfconv of XTDK is not installed"):
        compile_xpu("bf16", "int4", "xpu2")
    (tmp_path / "xpu2-elfconv").write_text(NOTHING)
    (tmp_path / "xpu2-elfconv").chmod(0o755)
    with pytest.raises(KernelsUnavailable, match="xpu2-elfconv made no code of encode"):
        compile_xpu("bf16", "int4", "xpu2")


@pytest.mark.parametrize("wire", ["bf16", "fp8_e4m3", "int4"])
def test_xtdk(wire: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if shutil.which("xpu3-elfconv") is None:
        pytest.skip("XTDK is not installed")
    monkeypatch.setenv("SAGE_KVT_CACHE", str(tmp_path))
    assert f"kv_encode_bf16_{wire}".encode() in compile_xpu("bf16", wire, "xpu3")


@pytest.mark.parametrize(
    ("sources", "told"),
    [
        (
            [CUDA / "fp8_convert.cu", CUDA / "int4_pack.cu"],
            [*(CUDA / name for name in cuda_compiler.HEADERS), *cuda_compiler.HOST_HEADERS],
        ),
        ([ascend_compiler.SOURCE], [*ascend_compiler.HEADERS, *ascend_compiler.HOST_HEADERS]),
        ([bang_compiler.SOURCE], [*bang_compiler.HEADERS, *bang_compiler.HOST_HEADERS]),
        ([xpu_compiler.SOURCE], [*xpu_compiler.HEADERS, *xpu_compiler.HOST_HEADERS]),
    ],
    ids=["cuda", "ascend", "bang", "xpu"],
)
def test_compilers_are_told_every_header(sources: list[Path], told: list[Path]) -> None:
    """NVRTC finds no other; and what is compiled is kept by their digest."""
    found: set[Path] = set()
    waiting = list(sources)
    while waiting:
        file = waiting.pop()
        for name in re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE):
            if name.startswith("xpu/") or name == "kernel_operator.h":  # XTDK's and CANN's own
                continue
            header = next(each for each in (file.parent / name, KERNELS / name) if each.exists()).resolve()
            if header not in found:
                found.add(header)
                waiting.append(header)
    assert found == {path.resolve() for path in told}
