# SPDX-License-Identifier: Apache-2.0
"""Count the lines that this process runs: imported at the start of each one of ``scripts/environment.py --measured``.

SlipCover puts a probe before each line of the checkout's modules when they are loaded: engines are not slower by it, as
they are under a tracer. What was counted is written at the process' end, and every ``INTERVAL_S``: engines end their
workers by SIGKILL. Not so in a process of pytest, which ends by itself: its tests count descriptors, and lower how many
there may be.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import secrets
import sys
from collections import defaultdict
from importlib.machinery import SourceFileLoader
from pathlib import Path
from threading import Event, Lock, Thread
from types import CodeType
from typing import NoReturn

from coverage import CoverageData
from coverage.exceptions import CoverageException
from slipcover import Slipcover

INTERVAL_S = 2.0
DATA_PLANE = "sage_kv_connector._data_plane"
#: What is counted, of the checkout.
ROOMS = ("sage_kv_connector", "vendors", "kernels")
#: Of SlipCover: probes stay.
NEVER_TAKEN_OUT = -1


class Lines:
    """Those that ran in this process, and in the one that it was forked from."""

    def __init__(self, checkout: Path, counted: Path) -> None:
        self._folders = tuple(f"{checkout / room}{os.sep}" for room in ROOMS)
        self._probes = Slipcover(d_miss_threshold=NEVER_TAKEN_OUT, exclude_lines=[])
        self._counted = counted
        self.begin()

    def begin(self) -> None:
        """In a new process, or in one that was forked: it writes a file of its own."""
        self._writing = Lock()
        self._written: dict[str, set[int]] = defaultdict(set)
        name = f"{self._counted}.{os.getpid()}.{secrets.token_hex(4)}"
        self._data = CoverageData(name)

    def of_loader(self, loader: SourceFileLoader, code: CodeType) -> CodeType:
        counts = loader.path.startswith(self._folders)
        return self._probes.instrument(code) if counts else code

    def write(self) -> None:
        """Those that were not written yet; prints why if they can't be, and tries them again next time."""
        with self._writing:
            new = {}
            for file, lines in list(self._probes.newly_seen.items()):
                if unwritten := set(lines) - self._written[file]:
                    new[file] = unwritten
            if not new:
                return
            try:
                self._data.add_lines(new)
                self._data.write()
            except CoverageException as error:
                print(f"counted lines were not written: {error}", file=sys.stderr)
                return
            for file, lines in new.items():
                self._written[file] |= lines


def count(lines: Lines) -> None:
    """Of what is imported from now on, and by ``python -m``."""
    load = SourceFileLoader.get_code
    leave = os._exit

    def get_code(loader: SourceFileLoader, name: str) -> CodeType | None:
        code = load(loader, name)
        return code and lines.of_loader(loader, code)

    def leave_counted(status: int) -> NoReturn:
        write(lines)
        leave(status)

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
    os._exit = leave_counted
    os.register_at_fork(after_in_child=lambda: (lines.begin(), begin(lines)))
    begin(lines)


def begin(lines: Lines) -> None:
    """In a new process, or in one that was forked: threads don't go along."""
    ended = Event()
    thread = Thread(target=write_now_and_then, args=(lines, ended), name="counted lines", daemon=True)

    def end() -> None:
        ended.set()
        thread.join()
        lines.write()  # the data plane writes its own at its end

    thread.start()
    atexit.register(end)


def write_now_and_then(lines: Lines, ended: Event) -> None:
    while not ended.wait(INTERVAL_S) and "pytest" not in sys.modules:
        write(lines)


def write(lines: Lines) -> None:
    """Lines of Python, then those of C++ if the data plane is there; both add to what was written before."""
    lines.write()
    module = sys.modules.get(DATA_PLANE)
    if module is not None and module.__file__ is not None:
        ctypes.CDLL(module.__file__).sage_kvt_write_counts()


if "SAGE_KVT_COUNTED" in os.environ:
    count(Lines(Path(os.environ["SAGE_KVT_CHECKOUT"]), Path(os.environ["SAGE_KVT_COUNTED"])))
