# SPDX-License-Identifier: Apache-2.0
"""A script of ours once more, in SGLang's environment, which this process may not be in."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from sage_kv_connector.launch.process import ServerError


def said_in_sglang(module: str, given: argparse.Namespace, *words: str) -> dict[str, Any]:
    """What ``python -m module`` prints there with ``words``, and ``only``, ``seed`` and ``logs`` as they were given.

    Raises ServerError if it printed nothing.
    """
    command = [sys.executable, "scripts/environment.py", "--sglang", "python", "-m", module, *words]
    command += ["--only", given.only, "--seed", str(given.seed), "--json"]
    if given.logs is not None:
        command += ["--logs", str(given.logs)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if not lines:
        raise ServerError(f"{' '.join(command)} ended with status {done.returncode}")
    said: dict[str, Any] = json.loads(lines[-1])
    return said
