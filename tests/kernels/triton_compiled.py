# SPDX-License-Identifier: Apache-2.0
"""Run by test_triton.py: the Triton kernels ahead of time for a backend, an architecture and a warp size."""

from __future__ import annotations

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sage_kv_connector.kernels.triton.convert import decode_kernel, encode_kernel

POINTERS = {"table": "*i64", "wire8": "*u8", "wire16": "*i16", "wire32": "*i32"}
FLOATS = ("reciprocal_up", "memory_scale", "wire_scale")
CASES = [
    ("*i16", "bf16", "fp8_e4m3", "channel", False),
    ("*u8", "fp8_e5m2", "fp16", "none", False),
    ("*i16", "fp16", "int4", "token", True),
]


def main(backend: str, architecture: str, warp: str) -> None:
    target = GPUTarget(backend, int(architecture) if architecture.isdigit() else architecture, int(warp))
    for kernel in (encode_kernel, decode_kernel):
        for pages, memory, wire, granularity, zero_point in CASES:
            constants = {
                "MEMORY": memory, "WIRE": wire, "GRANULARITY": granularity, "ZERO_POINT": zero_point,
                "BLOCK_TOKENS": 64, "BLOCK_DIM": 128,
            }  # fmt: skip
            types = {"pages": pages, **POINTERS, **dict.fromkeys(FLOATS, "fp32")}
            strides = {name: "i64" for name in kernel.arg_names if name.endswith("_stride")}
            signature = {
                name: "constexpr" if name in constants else {**strides, **types}.get(name, "i32")
                for name in kernel.arg_names
            }
            source = ASTSource(kernel, signature, constants)
            binary = triton.compile(source, target=target, options={"enable_fp_fusion": False})
            code = binary.asm["cubin" if backend == "cuda" else "hsaco"]
            print(kernel.__name__, memory, wire, granularity, len(code), "bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
