# SPDX-License-Identifier: Apache-2.0
"""A port for a server that is about to be started on this machine."""

from __future__ import annotations

import contextlib
import random
import socket

_issued: set[int] = set()


def free_port() -> int:
    """A port that nobody listens on, outside the range from which outgoing connections take theirs."""
    while True:
        port = random.randint(20000, 32000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("0.0.0.0", port))
            if port not in _issued:
                _issued.add(port)
                return port
