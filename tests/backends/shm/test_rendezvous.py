# SPDX-License-Identifier: Apache-2.0
"""What a peer passes before memory is shared."""

from __future__ import annotations

import os
import socket

import pytest

from sage_kv_connector.backends.shm.backend import ShmBackend
from tests.backends.pair import settle


@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("packet", [b"", b"x"])
def test_descriptors_of_a_bad_packet_are_closed(packet: bytes) -> None:
    backend = ShmBackend()
    name = backend.listen("shm://").removeprefix("shm://")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(8):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
            peer.settimeout(10)
            peer.connect(b"\0" + name.encode())
            socket.send_fds(peer, [packet], [0, 0])
            assert peer.recv(100) == b""  # refused
    settle(backend, 0.1)
    assert len(os.listdir("/proc/self/fd")) == before
