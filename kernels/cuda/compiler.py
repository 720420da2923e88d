# SPDX-License-Identifier: Apache-2.0
"""Compiles one pair of dtypes of the CUDA or HIP kernels, once a machine.

nvcc where it is installed, else NVRTC through ctypes; hipcc for HIP; the host's compiler for emulated devices.
"""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

from sage_kv_connector.kernels.common.compiler import (
    KERNELS,
    compiled_for,
    pair_options,
    run_compiler,
)
from sage_kv_connector.kernels.registry import KernelsUnavailable

SOURCES = KERNELS / "cuda"
HEADERS = ("kv_arithmetic.h", "kv_launch.h", "kv_tile.cuh", "kv_convert.cuh")
HOST_HEADERS = (SOURCES / "host_shim.h", KERNELS / "host_functions.h")
NVRTC = ("libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.11.2")


def compiled(memory: str, wire: str, architecture: str) -> bytes:
    """Code of ``kv_encode_<memory>_<wire>`` and ``kv_decode_…`` for sm_NN, gfxNNN or ``HOST``.

    Raises KernelsUnavailable with what is missing or what the compiler said.
    """
    source = SOURCES / ("int4_pack.cu" if wire == "int4" else "fp8_convert.cu")
    options = pair_options(memory, wire)

    def compile_now() -> bytes:
        if architecture.startswith("gfx"):
            return run_compiler("hipcc", source, [
                "-x", "hip", "-O3", "--genco", f"--offload-arch={architecture}", "-ffp-contract=off", *options,
            ], HIP_PLATFORM="amd")  # fmt: skip
        if shutil.which("nvcc"):
            return run_compiler("nvcc", source, [f"-arch={architecture}", "-cubin", *options])
        return _nvrtc(source, [f"--gpu-architecture={architecture}", *options])

    headers = [SOURCES / name for name in HEADERS]
    return compiled_for(architecture, f"{memory}-{wire}", source, headers, HOST_HEADERS, options, compile_now)


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
