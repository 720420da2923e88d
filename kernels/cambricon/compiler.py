# SPDX-License-Identifier: Apache-2.0
"""Compiles one pair of dtypes of the BANG C kernels, once a machine: cncc, or the host's for emulated devices."""

from __future__ import annotations

from sage_kv_connector.kernels.common.compiler import (
    KERNELS,
    SHARED_HEADERS,
    SHIM_HEADER,
    compiled_for,
    pair_options,
    run_compiler,
)

FOLDER = KERNELS / "cambricon"
SOURCE = FOLDER / "bang_kernel.mlu"
HEADERS = SHARED_HEADERS
HOST_HEADERS = (FOLDER / "host_shim.h", SHIM_HEADER)


def compiled(memory: str, wire: str, architecture: str) -> bytes:
    """A fat binary of ``kv_encode_<memory>_<wire>`` and ``kv_decode_…`` for mtp_NNN, or a library for ``HOST``.

    Raises KernelsUnavailable with what is missing or what the compiler said.
    """
    options = [*pair_options(memory, wire), f"-I{KERNELS}"]

    def compile_now() -> bytes:
        device = ["--bang-fatbin-only", f"--bang-mlu-arch={architecture}", "-O3", "-ffp-contract=off"]
        return run_compiler("cncc", SOURCE, [*device, *options])

    return compiled_for(
        architecture, f"bang-{memory}-{wire}", SOURCE, HEADERS, HOST_HEADERS, options, compile_now
    )
