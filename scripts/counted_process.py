# SPDX-License-Identifier: Apache-2.0
"""Count the lines that this process runs: imported at the start of each one of ``scripts/environment.py --measured``.

What was counted is written at its end, and every ``INTERVAL_S``: engines end their workers by SIGKILL. Not so in a
process of pytest, which ends by itself: its tests count descriptors, and lower how many there may be.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
from threading import Event, Thread

from coverage import Coverage, process_startup
from coverage.exceptions import CoverageException

INTERVAL_S = 2.0
DATA_PLANE = "sage_kv_connector._data_plane"


def begin() -> None:
    """In a new process, or in one that was forked: threads don't go along."""
    ended = Event()
    thread = Thread(target=write_now_and_then, args=(ended,), name="counted lines", daemon=True)

    def end() -> None:
        ended.set()
        thread.join()

    thread.start()
    atexit.register(end)


def write_now_and_then(ended: Event) -> None:
    while not ended.wait(INTERVAL_S) and "pytest" not in sys.modules:
        write()


def write() -> None:
    """Lines of Python, then those of C++ if the data plane is there; both add to what was written before."""
    coverage = Coverage.current()
    if coverage is not None:
        try:
            coverage.save()
        except CoverageException as error:
            print(f"counted lines were not written: {error}", file=sys.stderr)
    module = sys.modules.get(DATA_PLANE)
    if module is not None and module.__file__ is not None:
        ctypes.CDLL(module.__file__).sage_kvt_write_counts()


if process_startup() is not None:
    os.register_at_fork(after_in_child=begin)
    begin()
