# SPDX-License-Identifier: Apache-2.0
"""A program of a benchmark in a process group of its own, asked by lines; however it fails is one kind of error."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
#: A contender that says nothing for so long hangs.
ANSWER_S = 300.0


class ContenderError(RuntimeError):
    """A program of the benchmark failed; the message holds what it said."""


class Contender:
    """One pair of processes. Raises ContenderError when the program ends, hangs or answers nonsense."""

    def __init__(self, module: str, arguments: Sequence[str]) -> None:
        self._module = module
        # A pipe that nobody reads would stop it.
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            errors="replace",
            cwd=CHECKOUT,
            start_new_session=True,
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="bench-contender", daemon=True).start()
        try:
            self.about = self._answer("start")
            if (line := self._line("start")) != "ready":
                raise ContenderError(f"{module} answered {line[:200]!r} instead of ready")
        except ContenderError:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def ask(self, command: str) -> dict[str, Any]:
        """The answer to one line, an object."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None
        answer = self._answer(command)
        self._signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        """End it, by force if need be. Nothing of its process group is left."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        with suppress(OSError, subprocess.TimeoutExpired):
            self._process.stdin.write("quit\n")
            self._process.stdin.close()
            self._process.wait(10 if self._process.poll() is None else 0)
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._said.close()

    def _signal(self, number: int) -> None:
        """A peer's progress threads poll; out of its turn it is stopped, so as not to slow the others."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.strip())
        self._lines.put("")

    def _line(self, asked: str) -> str:
        try:
            line = self._lines.get(timeout=ANSWER_S)
        except queue.Empty:
            raise ContenderError(f"{self._module} did not answer {asked!r} within {ANSWER_S:.0f} s") from None
        if not line:
            raise self._ended()
        return line

    def _answer(self, asked: str) -> dict[str, Any]:
        line = self._line(asked)
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ContenderError(f"{self._module} answered {line[:200]!r} to {asked!r}, which is no object")
        return answer

    def _ended(self) -> ContenderError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._said.seek(0)
        said = self._said.read().strip().splitlines()
        return ContenderError(f"{self._module} ended: {said[-1] if said else 'it said nothing'}")
