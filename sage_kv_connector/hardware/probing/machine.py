# SPDX-License-Identifier: Apache-2.0
"""The machine as the probes see it: files, directories, links and tools, live or from a recording.

All reading goes through :class:`Machine`, so that what a probe makes of a machine can be
tested without it, and a user can send in what their machine shows.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol

#: Seconds a tool may take. Vendors' tools answer in 1 to 3 s on a machine with 16 chips.
TOOL_SECONDS = 10.0
#: Bytes of a file or of a tool's output that are read; topology tables are a few KiB.
MOST_BYTES = 1 << 20
#: Where tools are that are not on PATH; the vendors' own places are in their descriptors.
TOOL_DIRECTORIES = ("/usr/local/bin", "/usr/local/sbin")


class ToolState(StrEnum):
    """How a call of a tool ended."""

    answered = "answered"  #: it ended by itself, whatever its exit status
    missing = "missing"  #: no such program here
    hung = "hung"  #: it was stopped after the time limit


class ToolAnswer(NamedTuple):
    """What one call of a tool gave."""

    argv: tuple[str, ...]
    state: ToolState
    status: int = 0  #: exit status, if it answered
    output: str = ""  #: stdout
    errors: str = ""  #: stderr

    @property
    def command(self) -> str:
        return " ".join(self.argv)

    @property
    def usable(self) -> bool:
        return self.state is ToolState.answered and self.status == 0 and bool(self.output.strip())


class Machine(Protocol):
    """What probes may ask. Nothing raises for what is not there."""

    #: For people: "this machine" or the recording's directory.
    origin: str

    def read(self, path: str) -> str | None:
        """A file's text, without surrounding white space; None if it is absent or unreadable."""
        ...

    def names(self, path: str) -> list[str]:
        """Sorted names in a directory; empty if it is absent or unreadable."""
        ...

    def target(self, path: str) -> str | None:
        """Where a symbolic link points, as it is written; None if there is none."""
        ...

    def run(self, argv: Sequence[str]) -> ToolAnswer:
        """Run a tool with a time limit; ``argv[0]`` is a bare name."""
        ...


class LiveMachine:
    """The machine this process runs on."""

    origin = "this machine"

    def __init__(self, tool_seconds: float = TOOL_SECONDS, tool_directories: Sequence[str] = ()) -> None:
        """``tool_directories`` are searched after PATH and ``TOOL_DIRECTORIES``."""
        self.tool_seconds = tool_seconds
        self._behind_path = os.pathsep.join((*TOOL_DIRECTORIES, *tool_directories))

    def read(self, path: str) -> str | None:
        try:
            with open(path, "rb") as file:
                return file.read(MOST_BYTES).decode(errors="replace").strip()
        except OSError:
            return None

    def names(self, path: str) -> list[str]:
        try:
            return sorted(os.listdir(path))
        except OSError:
            return []

    def target(self, path: str) -> str | None:
        try:
            return os.readlink(path)
        except OSError:
            return None

    def run(self, argv: Sequence[str]) -> ToolAnswer:
        call = tuple(argv)
        path = shutil.which(call[0]) or shutil.which(call[0], path=self._behind_path)
        if path is None:
            return ToolAnswer(call, ToolState.missing)
        try:
            process = subprocess.Popen(
                (path, *call[1:]),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, "LC_ALL": "C"},
                start_new_session=True,
            )
        except OSError as error:
            return ToolAnswer(call, ToolState.answered, 126, "", f"{path}: {error.strerror}")
        try:
            output, errors = process.communicate(timeout=self.tool_seconds)
        except subprocess.TimeoutExpired:
            _stop(process)
            return ToolAnswer(call, ToolState.hung)
        return ToolAnswer(call, ToolState.answered, process.returncode, _text(output), _text(errors))


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Kill a tool and its children. One stuck in a driver call can't be waited for, so nobody waits long."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        process.communicate(timeout=1.0)
    except subprocess.TimeoutExpired:
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def _text(raw: bytes) -> str:
    return raw[:MOST_BYTES].decode(errors="replace")


class WithoutTools:
    """A machine on which some tools are treated as missing (``sage-kvt probe --without TOOL``)."""

    def __init__(self, machine: Machine, names: Sequence[str]) -> None:
        self._machine = machine
        self._hidden = frozenset(names)
        self.origin = machine.origin

    def read(self, path: str) -> str | None:
        return self._machine.read(path)

    def names(self, path: str) -> list[str]:
        return self._machine.names(path)

    def target(self, path: str) -> str | None:
        return self._machine.target(path)

    def run(self, argv: Sequence[str]) -> ToolAnswer:
        if argv[0] in self._hidden:
            return ToolAnswer(tuple(argv), ToolState.missing)
        return self._machine.run(argv)
