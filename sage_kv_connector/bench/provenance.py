# SPDX-License-Identifier: Apache-2.0
"""When, where and from which sources a figure was measured, as results keep it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sage_kv_connector.bench.contender import CHECKOUT


def provenance() -> dict[str, Any]:
    """``commit``, ``date`` (UTC) and ``machine``."""
    return {
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
    }


def commit() -> str:
    """Of the checkout; "+" where files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or "unknown"


def machine_text(machine: dict[str, Any]) -> str:
    """What ``provenance`` keeps of a machine, for a page."""
    return (
        f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"Linux {machine['kernel']}"
    )


def _machine() -> dict[str, Any]:
    cpus = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpus[1] if cpus else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory,
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
