# SPDX-License-Identifier: Apache-2.0
"""Compiles one pair of dtypes of the Ascend C kernels, once a machine: ccec, or the host's for emulated devices."""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import partial
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

FOLDER = KERNELS / "ascend"
SOURCE = FOLDER / "ascend_kernel.cc"
HEADERS = (FOLDER / "lanes.h", *SHARED_HEADERS)
HOST_HEADERS = (FOLDER / "host_shim.h", SHIM_HEADER)
#: Where CANN is, unless $ASCEND_HOME_PATH says it.
TOOLKIT = "/usr/local/Ascend/ascend-toolkit/latest"
#: ccec and the linker of its own, in a toolkit.
TOOLS = "compiler/ccec_compiler/bin"
#: What has kernel_operator.h and the headers that it includes, in toolkits of CANN 7 to 8 and newer ones.
INCLUDES = (
    "compiler/tikcpp", "compiler/tikcpp/tikcfw", "compiler/tikcpp/tikcfw/impl", "compiler/tikcpp/tikcfw/interface",
    "asc/include", "asc/include/basic_api", "asc/include/interface", "asc/impl", "include",
)  # fmt: skip
#: As CANN's own builds of operators have them: a stack for the scalar unit, and kernels that may lie anywhere.
BACKEND = (
    "-mllvm", "-cce-aicore-stack-size=0x8000",
    "-mllvm", "-cce-aicore-function-stack-size=0x8000",
    "-mllvm", "-cce-aicore-addr-transform",
)  # fmt: skip


def compiled(memory: str, wire: str, architecture: str) -> bytes:
    """An ELF of ``kv_encode_<memory>_<wire>`` and ``kv_decode_…`` for dav-…-vec, or a library for ``HOST``.

    Raises KernelsUnavailable with what is missing or what a tool said.
    """
    options = [*pair_options(memory, wire), f"-I{KERNELS}"]

    return compiled_for(
        architecture,
        f"ascend-{memory}-{wire}",
        SOURCE,
        HEADERS,
        HOST_HEADERS,
        options,
        partial(_linked, options, architecture),
    )


def _linked(options: list[str], architecture: str) -> bytes:
    toolkit = Path(os.environ.get("ASCEND_HOME_PATH") or TOOLKIT)
    ccec = shutil.which("ccec") or shutil.which("ccec", path=str(toolkit / TOOLS))
    if ccec is None:
        raise KernelsUnavailable("ccec of CANN is not installed, and there is nothing else to compile with")
    includes = [f"-I{toolkit / folder}" for folder in INCLUDES if (toolkit / folder).is_dir()]
    device = ["-c", "-x", "cce", "-O3", "-ffp-contract=off", "--cce-aicore-only", *BACKEND]
    with tempfile.TemporaryDirectory() as folder:
        made, output = Path(folder, "kernel.o"), Path(folder, "kernel")
        made.write_bytes(
            run_compiler(ccec, SOURCE, [*device, f"--cce-aicore-arch={architecture}", *includes, *options])
        )
        linker = str(Path(ccec).with_name("ld.lld"))  # another one knows no aicorelinux
        run_tool([linker, "-m", "aicorelinux", "-Ttext=0", "-static", "-o", str(output), str(made)])
        return output.read_bytes()
