# SPDX-License-Identifier: Apache-2.0
"""A digest of memory, read back through its addresses: what an audit compares on both sides."""

from __future__ import annotations

import ctypes
from typing import Protocol

from sage_kv_connector.backends.base import Segments


class Hash(Protocol):
    def update(self, data: memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


def digest_segments(segments: Segments, state: Hash) -> str:
    """Feed every segment (address, length of this process's memory) in order; returns the hex digest."""
    for address, length in segments.tolist():
        state.update(memoryview((ctypes.c_char * length).from_address(address)))
    return state.hexdigest()
