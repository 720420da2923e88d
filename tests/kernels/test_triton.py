# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels: run by Triton's interpreter on the CPU, compiled for devices that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")


def run(module: str, *arguments: str, **environment: str) -> str:
    command = [sys.executable, "-m", f"tests.kernels.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_interpreted() -> None:
    run("triton_interpreted", TRITON_INTERPRET="1")


@pytest.mark.parametrize(
    "target", [("cuda", "80", "32"), ("cuda", "90", "32"), ("hip", "gfx906", "64"), ("hip", "gfx942", "64")]
)
def test_compiled(target: tuple[str, str, str], tmp_path: Path) -> None:
    assert run("triton_compiled", *target, TRITON_CACHE_DIR=str(tmp_path)).count("bytes") == 6
