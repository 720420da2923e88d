# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import socket
from functools import partial
from typing import Any

from sage_kv_connector.backends.tcp.backend import TcpBackend
from tests.backends.kinds import Kind, Stranger, forge_native
from tests.backends.tcp.wire import parse_address

BOUNDS = (("chunk_bytes", 100), ("spin_us", 10**9), ("socket_buffer", -1))


def stranger(address: str) -> Stranger:
    return Stranger(socket.AF_INET, socket.SOCK_STREAM, parse_address(address))


def _two_lanes(**options: Any) -> TcpBackend:
    return TcpBackend(lanes=2, **options)


def _two_links(**options: Any) -> TcpBackend:
    return TcpBackend(links=("127.0.0.1", "127.0.0.2"), **options)


_kind = partial(
    Kind,
    listen_on="tcp://127.0.0.1:0",
    mode="stream",
    crosses_wire=True,
    stranger=stranger,
    kernel_answers=True,
    forge=forge_native,
)
KINDS = (
    _kind("tcp-1-lane", TcpBackend, bounds=(("lanes", 0), *BOUNDS)),
    _kind("tcp-2-lanes", _two_lanes, lanes=2, bounds=BOUNDS),
    _kind("tcp-2-links", _two_links, lanes=2, bounds=BOUNDS),
    _kind("tcp-authenticated", _two_lanes, lanes=2, encrypts=False),
    _kind("tcp-encrypted", _two_lanes, lanes=2, encrypts=True),
)
