# SPDX-License-Identifier: Apache-2.0
"""Runs compilers of kernels, once a machine.

Results are kept under ``$SAGE_KVT_CACHE`` (default ``~/.cache/sage_kv_connector``) by the sources' digest and
the architecture.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from sage_kv_connector.kernels.common.launch import TYPE_NAMES, WIRE_TYPE_NAMES
from sage_kv_connector.kernels.registry import KernelsUnavailable

#: Where the folders of kernels are.
KERNELS = Path(__file__).parent.parent
#: What emulated devices have kernels compiled for: a shared library of this machine.
HOST = "host"
HOST_COMPILERS = ("c++", "g++", "clang++")
#: What the sources of every vendor include, and their host shims.
SHARED_HEADERS = (KERNELS / "cuda" / "kv_arithmetic.h", KERNELS / "cuda" / "kv_launch.h")
SHIM_HEADER = KERNELS / "host_functions.h"


def pair_options(memory: str, wire: str) -> list[str]:
    """What makes a source's kernels those of one pair of dtypes."""
    return [
        "-std=c++17",
        f"-DKV_MEMORY={memory}", f"-DKV_MEMORY_TYPE={TYPE_NAMES[memory]}",
        f"-DKV_WIRE={wire}", f"-DKV_WIRE_TYPE={WIRE_TYPE_NAMES[wire]}",
    ]  # fmt: skip


def compiled_once(
    name: str, sources: Sequence[Path], options: Sequence[str], compile_now: Callable[[], bytes]
) -> bytes:
    """What ``compile_now`` returned for these sources and options, on this machine. ``name`` is for people."""
    parts = [*(source.read_bytes() for source in sources), " ".join(options).encode()]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    root = Path(os.environ.get("SAGE_KVT_CACHE") or Path.home() / ".cache" / "sage_kv_connector")
    kept = root / "kernels" / f"{name}-{digest}"
    if kept.exists():
        return kept.read_bytes()
    code = compile_now()
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_bytes(code)
    partial.rename(kept)
    return code


def compiled_for(
    architecture: str,
    name: str,
    source: Path,
    headers: Sequence[Path],
    host_headers: Sequence[Path],
    options: Sequence[str],
    compile_now: Callable[[], bytes],
) -> bytes:
    """``compiled_once``: for ``HOST`` by the host's compiler through ``host_headers``, else by ``compile_now``."""
    host = architecture == HOST
    texts = [source, *headers, *(host_headers if host else ())]
    by_host = partial(host_library, source, options)
    return compiled_once(f"{name}-{architecture}", texts, options, by_host if host else compile_now)


def run_compiler(compiler: str, source: Path, options: Sequence[str], **environment: str) -> bytes:
    """The file that it makes. Raises KernelsUnavailable with what is missing or what the compiler said."""
    if shutil.which(compiler) is None:
        raise KernelsUnavailable(f"{compiler} is not installed, and there is nothing else to compile with")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "kernel"
        run_tool([compiler, *options, "-o", str(output), str(source)], **environment)
        return output.read_bytes()


def run_tool(command: Sequence[str], **environment: str) -> None:
    """Raises KernelsUnavailable with what it said."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode != 0:
        raise KernelsUnavailable(f"{' '.join(command)} failed: {done.stderr.strip()}")


def host_library(source: Path, options: Sequence[str]) -> bytes:
    """Kernels as functions of a shared library of this machine, through their host shim. Raises KernelsUnavailable."""
    given = os.environ.get("CXX") or HOST_COMPILERS[0]
    compiler = next(filter(shutil.which, (given, *HOST_COMPILERS)), "c++")
    return run_compiler(compiler, source, [
        "-x", "c++", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-fvisibility=hidden",
        "-Wno-unknown-pragmas", "-DKV_HOST_SHIM", *options,
    ])  # fmt: skip
