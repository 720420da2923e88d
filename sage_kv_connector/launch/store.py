# SPDX-License-Identifier: Apache-2.0
"""A ``sage-kvt store`` as a child process: started for benchmarks and tests, and ended with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class StoreProcess:
    """``addresses``: what it printed."""

    popen: subprocess.Popen[str]
    addresses: list[str]

    def address(self, backend: str) -> str:
        """The one that begins with ``backend``."""
        return next(a for a in self.addresses if a.startswith(f"{backend}://"))


@contextmanager
def store_process(
    capacity: str, *, port: int = 0, options: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> Iterator[StoreProcess]:
    """One on loopback. Raises RuntimeError if it does not start; its log goes to this process's stderr."""
    words = [word for option in options for word in ("--option", option)]
    popen = subprocess.Popen(
        [
            sys.executable, "-c", "from sage_kv_connector.cli.main import app; app()", "store", "--json",
            "--capacity", capacity, "--host", "127.0.0.1", "--port", str(port), *words,
        ],
        stdout=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}, start_new_session=True,
    )  # fmt: skip
    assert popen.stdout is not None
    try:
        line = popen.stdout.readline()
        if not line:
            raise RuntimeError(f"sage-kvt store ended with status {popen.wait()} before it served")
        yield StoreProcess(popen, json.loads(line)["address"])
    finally:
        popen.terminate()
        try:
            popen.wait(10)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()
        popen.stdout.close()
