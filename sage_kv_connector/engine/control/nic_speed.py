# SPDX-License-Identifier: Apache-2.0
"""How fast the network card is that an address of this machine belongs to."""

from __future__ import annotations

import fcntl
import socket
import struct
from functools import lru_cache
from pathlib import Path

_SIOCGIFADDR = 0x8915


@lru_cache(maxsize=64)
def nic_speed(address: str) -> float:
    """Bytes a second of the interface with this ``HOST:PORT`` (IPv4); 0 where the system does not say."""
    host = address.rpartition(":")[0]
    for _, name in socket.if_nameindex():
        if _address_of(name) != host:
            continue
        try:
            speed = int(Path(f"/sys/class/net/{name}/speed").read_text())
        except (OSError, ValueError):
            return 0.0
        return max(0, speed) * 1e6 / 8
    return 0.0


def _address_of(interface: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            answer = fcntl.ioctl(asked, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])
