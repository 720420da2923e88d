# SPDX-License-Identifier: Apache-2.0
"""Memory is shared with processes of the same user only, whoever dialled."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys

import pytest

from sage_kv_connector.backends.base import EventKind
from sage_kv_connector.backends.shm.backend import ShmBackend
from tests.backends.pair import settle, until_event

NOBODY = 65534
#: Run as another user: listens under a name, or connects to one, and tells what it hears.
STRANGER = """
import os, socket, sys
os.setuid(int(sys.argv[3]))
made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
name = b"\\0" + sys.argv[2].encode()
if sys.argv[1] == "listens":
    made.bind(name)
    made.listen()
    print("listens", flush=True)
    sys.stdin.readline()
else:
    made.connect(name)
    made.settimeout(5)
    print("closed" if made.recv(100) == b"" else "served", flush=True)
"""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


def stranger(does: str, name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", STRANGER, does, name, str(NOBODY)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_another_user_may_not_connect() -> None:
    backend = ShmBackend()
    name = backend.listen("shm://").removeprefix("shm://")
    with stranger("connects", name) as process:
        assert said(process) == "closed"
    assert settle(backend, 0.1) == []
    friend = ShmBackend()
    friend.connect(f"shm://{name}", 5.0)
    until_event(friend, EventKind.CONNECTED)
    friend.close()
    backend.close()


def test_another_users_name_is_not_connected_to() -> None:
    """Whoever takes the name of a process that ended."""
    name = f"sage-kvt-test-{os.getpid()}"
    backend = ShmBackend()
    with stranger("listens", name) as process:
        assert said(process) == "listens"
        with pytest.raises(PermissionError, match="Permission denied"):
            backend.connect(f"shm://{name}", 5.0)
        process.communicate("over\n")
    assert settle(backend, 0.05) == []
    assert not [s for s in os.listdir("/proc/self/fd") if socket_of(s)]
    backend.close()


def socket_of(fd: str) -> bool:
    """Whether a descriptor is a connected unix socket of packets."""
    try:
        if not stat.S_ISSOCK(os.stat(f"/proc/self/fd/{fd}").st_mode):
            return False
        with socket.socket(fileno=os.dup(int(fd))) as one:
            return (
                one.family == socket.AF_UNIX and one.type == socket.SOCK_SEQPACKET and bool(one.getpeername())
            )
    except OSError:
        return False
