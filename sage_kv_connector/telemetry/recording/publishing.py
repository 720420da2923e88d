# SPDX-License-Identifier: Apache-2.0
"""An engine's snapshots for other processes of the same user on the same machine: a Unix socket that answers with one.

Nothing happens until somebody asks. The socket lies in a directory of this user that nobody else can enter, and whoever
connects must be this user or root.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path

from sage_kv_connector.telemetry.recording.snapshot import Snapshot, encode

logger = logging.getLogger(__name__)

DIRECTORY_ENV = "SAGE_KVT_TELEMETRY_DIR"
ENDING = ".sock"
#: A reader that takes longer is given up.
SLOWEST_READER_S = 2.0
_numbers = count()


def directory() -> Path:
    """Where sockets of this user lie: $SAGE_KVT_TELEMETRY_DIR, $XDG_RUNTIME_DIR/sage_kvt or /tmp/sage_kvt-UID."""
    if given := os.environ.get(DIRECTORY_ENV):
        return Path(given)
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "sage_kvt"
    return Path(f"/tmp/sage_kvt-{os.getuid()}")


def check_private(path: Path) -> None:
    """Raises PermissionError for a directory that is not this user's alone, FileNotFoundError for none."""
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise PermissionError(
            f"{path} must be a directory of user {os.getuid()} with mode 700; it belongs to {found.st_uid} and has "
            f"mode {stat.S_IMODE(found.st_mode):o}. Remove it, or set {DIRECTORY_ENV}"
        )


class Publisher:
    """Answers until ``close``. Raises OSError where there can be no socket."""

    def __init__(self, take: Callable[[], Snapshot]) -> None:
        self._take = take
        where = directory()
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_private(where)
        self.path = where / f"{os.getpid()}-{next(_numbers)}{ENDING}"
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()  # of a process with this number that is gone
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.bind(str(self.path))
            self._socket.listen(8)
        except OSError:
            self._socket.close()
            raise
        self._thread = threading.Thread(target=self._serve, name="sage-kvt-telemetry", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Idempotent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join()
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def _serve(self) -> None:
        while True:
            try:
                reader, _ = self._socket.accept()
            except OSError:
                return
            with reader:
                try:
                    reader.settimeout(SLOWEST_READER_S)
                    if _user_of(reader) in (os.getuid(), 0):
                        reader.sendall(encode(self._take()))
                except OSError:
                    pass  # it went away
                except Exception:
                    logger.exception("a snapshot could not be taken")


def publish(take: Callable[[], Snapshot]) -> Publisher | None:
    """A publisher; None, and a line in the log, where there can be none."""
    try:
        return Publisher(take)
    except OSError as error:
        logger.warning("sage-kvt exporter and top can't read this engine: %s", error)
        return None


def _user_of(peer: socket.socket) -> int:
    """The user id of the process at the other end."""
    found = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", found)[1])
