# SPDX-License-Identifier: Apache-2.0
"""Compiles one pair of dtypes of the CUDA or HIP kernels, once a machine.

nvcc where it is installed, else NVRTC through ctypes; hipcc for HIP; the host's compiler for emulated
devices. Results are kept under ``$SAGE_KVT_CACHE`` (default ``~/.cache/sage_kv_connector``) by the sources'
digest and architecture.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from sage_kv_connector.kernels.cuda.launch import TYPE_NAMES, WIRE_TYPE_NAMES
from sage_kv_connector.kernels.registry import KernelsUnavailable

SOURCES = Path(__file__).parent
HEADERS = ("kv_arithmetic.h", "kv_tile.cuh", "kv_convert.cuh")
#: What emulated devices have kernels compiled for: a shared library of this machine.
HOST = "host"
HOST_COMPILERS = ("c++", "g++", "clang++")
NVRTC = ("libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.11.2")


def compiled(memory: str, wire: str, architecture: str) -> bytes:
    """Code of ``kv_encode_<memory>_<wire>`` and ``kv_decode_…`` for sm_NN, gfxNNN or ``HOST``.

    Raises KernelsUnavailable with what is missing or what the compiler said.
    """
    source = SOURCES / ("int4_pack.cu" if wire == "int4" else "fp8_convert.cu")
    options = [
        "-std=c++17",
        f"-DKV_MEMORY={memory}", f"-DKV_MEMORY_TYPE={TYPE_NAMES[memory]}",
        f"-DKV_WIRE={wire}", f"-DKV_WIRE_TYPE={WIRE_TYPE_NAMES[wire]}",
    ]  # fmt: skip
    headers = (*HEADERS, "host_shim.h") if architecture == HOST else HEADERS
    texts = [source.read_bytes(), *((SOURCES / name).read_bytes() for name in headers)]
    digest = hashlib.sha256(b"\0".join([*texts, " ".join(options).encode()])).hexdigest()[:16]
    root = Path(os.environ.get("SAGE_KVT_CACHE") or Path.home() / ".cache" / "sage_kv_connector")
    kept = root / "kernels" / f"{memory}-{wire}-{architecture}-{digest}"
    if kept.exists():
        return kept.read_bytes()
    if architecture.startswith("gfx"):
        code = _command("hipcc", source, [
            "-x", "hip", "-O3", "--genco", f"--offload-arch={architecture}", "-ffp-contract=off", *options,
        ])  # fmt: skip
    elif architecture == HOST:
        compiler = next(
            filter(shutil.which, (os.environ.get("CXX") or HOST_COMPILERS[0], *HOST_COMPILERS)), "c++"
        )
        code = _command(compiler, source, [
            "-x", "c++", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-fvisibility=hidden",
            "-Wno-unknown-pragmas", "-DKV_HOST_SHIM", *options,
        ])  # fmt: skip
    elif shutil.which("nvcc"):
        code = _command("nvcc", source, [f"-arch={architecture}", "-cubin", *options])
    else:
        code = _nvrtc(source, [f"--gpu-architecture={architecture}", *options])
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_bytes(code)
    partial.rename(kept)
    return code


def _command(compiler: str, source: Path, options: list[str]) -> bytes:
    if shutil.which(compiler) is None:
        raise KernelsUnavailable(f"{compiler} is not installed, and there is nothing else to compile with")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "kernel"
        command = [compiler, *options, "-o", str(output), str(source)]
        environment = os.environ | ({"HIP_PLATFORM": "amd"} if compiler == "hipcc" else {})
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            raise KernelsUnavailable(f"{' '.join(command)} failed: {done.stderr.strip()}")
        return output.read_bytes()


def load_library(names: tuple[str, ...]) -> ctypes.CDLL:
    """The first of ``names`` that loads; raises KernelsUnavailable naming them."""
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            pass
    raise KernelsUnavailable(f"none of {', '.join(names)} can be loaded")


def _nvrtc(source: Path, options: list[str]) -> bytes:
    try:
        nvrtc = load_library(NVRTC)
    except KernelsUnavailable as error:
        raise KernelsUnavailable(f"nvcc is not installed, and {error}") from None
    program = ctypes.c_void_p()
    headers = (ctypes.c_char_p * len(HEADERS))(*((SOURCES / name).read_bytes() for name in HEADERS))
    names = (ctypes.c_char_p * len(HEADERS))(*(name.encode() for name in HEADERS))
    text = ctypes.c_char_p(source.read_bytes())
    arguments = (ctypes.byref(program), text, source.name.encode(), len(HEADERS), headers, names)
    _checked(nvrtc.nvrtcCreateProgram(*arguments), "nvrtcCreateProgram")
    try:
        flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), flags)
        size = ctypes.c_size_t()
        if status != 0:
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise KernelsUnavailable(f"NVRTC: {log.value.decode(errors='replace').strip()}")
        _checked(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "nvrtcGetCUBINSize")
        code = ctypes.create_string_buffer(size.value)
        _checked(nvrtc.nvrtcGetCUBIN(program, code), "nvrtcGetCUBIN")
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _checked(status: int, call: str) -> None:
    if status != 0:
        raise KernelsUnavailable(f"{call} returned {status}")
