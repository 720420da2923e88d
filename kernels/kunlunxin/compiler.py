# SPDX-License-Identifier: Apache-2.0
"""Compiles one pair of dtypes of the XPU C++ kernels, once a machine: XTDK, or the host's for emulated devices."""

from __future__ import annotations

import io
import shutil
import tempfile
import zipfile
from pathlib import Path

from sage_kv_connector.kernels.common.compiler import (
    KERNELS,
    SHARED_HEADERS,
    SHIM_HEADER,
    compiled_for,
    pair_options,
    run_compiler,
    run_tool,
)
from sage_kv_connector.kernels.registry import KernelsUnavailable

FOLDER = KERNELS / "kunlunxin"
SOURCE = FOLDER / "xpu_kernel.xpu"
HEADERS = SHARED_HEADERS
HOST_HEADERS = (FOLDER / "host_shim.h", SHIM_HEADER)
ELF = b"\x7fELF"


def compiled(memory: str, wire: str, architecture: str) -> bytes:
    """A zip of the code of ``kv_encode_<memory>_<wire>`` and ``kv_decode_…`` for xpuN, or a library for ``HOST``.

    Raises KernelsUnavailable with what is missing or what a tool said.
    """
    options = [*pair_options(memory, wire), f"-I{KERNELS}"]

    def compile_now() -> bytes:
        image = io.BytesIO()
        with zipfile.ZipFile(image, "w") as both:
            for verb in ("encode", "decode"):
                code = _code(options, architecture, verb)
                both.writestr(zipfile.ZipInfo(f"kv_{verb}_{memory}_{wire}"), code)
        return image.getvalue()

    return compiled_for(
        architecture, f"xpu-{memory}-{wire}", SOURCE, HEADERS, HOST_HEADERS, options, compile_now
    )


def _code(options: list[str], architecture: str, verb: str) -> bytes:
    """A translation unit has one kernel; XTDK's elfconv makes of its object what the runtime takes."""
    name = f"{architecture}-elfconv"
    elfconv = shutil.which(name)
    if elfconv is None:
        raise KernelsUnavailable(
            f"{name} of XTDK is not installed, and there is nothing else to compile with"
        )
    tools = Path(elfconv).parent
    device = [
        f"--xpu-arch={architecture}",
        "--xpu-device-only",
        "-c",
        "-O2",
        "-fno-builtin",
        "-ffp-contract=off",
    ]
    which = [f"-DKV_VERB={verb}", f"-DKV_ENCODE={str(verb == 'encode').lower()}"]
    with tempfile.TemporaryDirectory() as folder:
        made, output = Path(folder, "kernel.o"), Path(folder, "kernel")
        made.write_bytes(run_compiler(str(tools / "clang"), SOURCE, [*device, *options, *which]))
        run_tool(["bash", elfconv, str(made), str(output), str(tools)])
        # One release of it leaves the code beside a host object, another in its place.
        for found in (output.with_suffix(".bin"), output):
            if found.exists() and not found.read_bytes().startswith(ELF):
                return found.read_bytes()
    raise KernelsUnavailable(f"{name} made no code of {verb}")
