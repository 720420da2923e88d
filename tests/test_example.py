# SPDX-License-Identifier: Apache-2.0
"""The example of the README does what it says."""

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "examples" / "move_numpy_pages.py"


def test_numpy_pages_move_between_two_processes() -> None:
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "16 MiB over shm at" in done.stdout
    assert "every byte equal" in done.stdout
