# SPDX-License-Identifier: Apache-2.0
"""CPU time by the kernel's scheduler, in nanoseconds where clock ticks are too coarse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def cpu_of_threads(process: int | str = "self") -> Iterator[tuple[str, float]]:
    """Name and CPU seconds of each thread that a process has."""
    for task in Path(f"/proc/{process}/task").iterdir():
        yield (task / "comm").read_text().strip(), int((task / "schedstat").read_text().split()[0]) / 1e9
