# SPDX-License-Identifier: Apache-2.0
"""Which node a process is on."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def node_id() -> str:
    """The same for processes that can reach each other by shm: one kernel boot, one network namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/net")
    except OSError:
        return ""
    return hashlib.sha256(f"{boot} {namespace}".encode()).hexdigest()[:16]
