# SPDX-License-Identifier: Apache-2.0
"""Which processes ACL lets open a key."""

from __future__ import annotations

import subprocess
import sys

from tests.vendors.rig import Rig
from tests.vendors.test_memory import IMPORTER


def test_ascend_lets_in_only_who_was_named() -> None:
    rig = Rig("ascend")
    base = rig.runtime.alloc(0, 8192)
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORTER, "ascend"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    handle = rig.runtime.ipc_export(0, base, 8192, 1)
    _, errors = process.communicate(handle.hex() + "\n")
    assert "ACL_ERROR_RT_NO_PERMISSION" in errors
