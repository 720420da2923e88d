# SPDX-License-Identifier: Apache-2.0
"""Another Python process of the tests' own: a line of JSON at a time is said to it and heard from it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple


class OtherProcess(NamedTuple):
    process: subprocess.Popen[str]

    def hear(self) -> Any:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def say(self, words: str) -> Any:
        """Returns its answer."""
        assert self.process.stdin
        self.process.stdin.write(words + "\n")
        self.process.stdin.flush()
        return self.hear()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def other_process(code: str, *arguments: str) -> Iterator[OtherProcess]:
    """Runs ``code`` with ``arguments`` in ``sys.argv[1:]``; it should end when nothing more is said to it."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    try:
        yield OtherProcess(process)
        process.stdin.close()
        process.wait(20)
    finally:
        process.kill()
        process.wait()
