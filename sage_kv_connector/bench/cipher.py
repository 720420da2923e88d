# SPDX-License-Identifier: Apache-2.0
"""What libcrypto's AES-GCM alone costs on this machine, and the instructions that it may use."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from sage_kv_connector import _data_plane

#: What AES-GCM is fast with; vectors of it are the last three.
INSTRUCTIONS = ("aes", "pclmulqdq", "vaes", "vpclmulqdq", "avx512f")
SLICE_BYTES = 128 << 10
TOTAL_BYTES = 256 << 20
ROUNDS = 5


def measure_ciphers(levels: Iterable[str]) -> dict[str, Any]:
    """One thread, slices in the cache: GB/s of CPU time, and cycles a byte where the kernel tells the clock."""
    flags, mhz = _cpu()
    out: dict[str, Any] = {
        "library": _data_plane.libcrypto()[0],
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "mhz": mhz,
    }
    for level in levels:
        seconds = median(_seconds(level == "encrypted") for _ in range(ROUNDS))
        out[level] = {
            "gbytes_per_s": TOTAL_BYTES / seconds / 1e9,
            "cycles_per_byte": seconds * mhz * 1e6 / TOTAL_BYTES if mhz else None,
        }
    return out


def _seconds(encrypts: bool) -> float:
    """Of this thread's own CPU time, so that others beside it do not count."""
    begun = time.thread_time()
    _data_plane.measure_cipher(encrypts, TOTAL_BYTES, SLICE_BYTES)
    return time.thread_time() - begun


def cipher_rows(cipher: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """For people."""
    names = " ".join(cipher["instructions"]) or f"none known of {platform.machine()}"
    for level in ("authenticated", "encrypted"):
        if level in cipher:
            part = cipher[level]
            cycles = f", {part['cycles_per_byte']:.2f} cycles a byte" if part["cycles_per_byte"] else ""
            yield f"cipher alone, {level}", f"{part['gbytes_per_s']:.2f} GB/s{cycles}"
    yield "cipher", f"{cipher['library']}; {names}"


def _cpu() -> tuple[set[str], float]:
    """Flags and clock of the first core; 0 where it is not told."""
    flags: set[str] = set()
    mhz = 0.0
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags" and not flags:
            flags = set(value.split())
        if name.strip() == "cpu MHz" and not mhz:
            mhz = float(value)
    return flags, mhz
