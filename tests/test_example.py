# SPDX-License-Identifier: Apache-2.0
"""The examples of README and docs/sage.md do what they say."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_numpy_pages_move_between_two_processes() -> None:
    printed = run("move_numpy_pages.py")
    assert "16 MiB over shm at" in printed
    assert "every byte equal" in printed


@pytest.mark.skipif(find_spec("sagellm_kv_cache") is None, reason="the SAGE packages want Python 3.11")
def test_sages_transfer_engine_moves_a_tensor_between_two_processes() -> None:
    assert run("move_sage_kv.py").splitlines()[-1] == "completed: 4 MiB, every value equal"
