# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import socket
from typing import Any

from sage_kv_connector.backends.shm.backend import ShmBackend
from tests.backends.kinds import Kind, Stranger, forge_native

BOUNDS = (("lanes", 0), ("chunk_bytes", 100), ("spin_us", 10**9), ("arena_bytes", 1))


def stranger(address: str) -> Stranger:
    return Stranger(socket.AF_UNIX, socket.SOCK_SEQPACKET, "\0" + address.removeprefix("shm://"))


def _arena(**options: Any) -> ShmBackend:
    return ShmBackend(allow_direct=False, **{"arena_bytes": 4 << 20, **options})


KINDS = (
    Kind(
        "shm-direct",
        ShmBackend,
        "shm://",
        "direct",
        crosses_wire=False,
        bounds=BOUNDS,
        stranger=stranger,
        forge=forge_native,
    ),
    Kind(
        "shm-arena",
        _arena,
        "shm://",
        "arena",
        crosses_wire=True,
        bounds=BOUNDS,
        stranger=stranger,
        forge=forge_native,
    ),
)
