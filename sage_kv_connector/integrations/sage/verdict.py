# SPDX-License-Identifier: Apache-2.0
"""What a receiver tells a sender: u32 1 if all bytes arrived and held, u32 length of the reason, reason."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from sage_kv_connector.backends.base import Segments
from sage_kv_connector.engine import Cursor, MemorySource, PageRuns

_HEADER = struct.Struct("<II")
VERDICT_BYTES = 256


class Verdict(MemorySource):
    """A verdict on offer, with its memory. ``error``: why the message did not arrive, "" if it did."""

    def __init__(self, error: str) -> None:
        reason = error.encode()[: VERDICT_BYTES - _HEADER.size]
        packed = _HEADER.pack(int(not error), len(reason)) + reason
        self._memory = np.frombuffer(bytearray(packed.ljust(VERDICT_BYTES, b"\0")), dtype=np.uint8)
        self.segments: Segments = np.array([(self._memory.ctypes.data, VERDICT_BYTES)], dtype=np.uint64)
        self.asked_for = False  #: the sender came for it
        super().__init__(self.segments)

    def cursor(self, selection: tuple[PageRuns, ...], nbytes: int) -> Cursor:
        cursor = super().cursor(selection, nbytes)
        self.asked_for = True
        return cursor


def refusal_in(verdict: np.ndarray[Any, np.dtype[np.uint8]]) -> str:
    """Why the receiver failed, "" if all arrived."""
    well, length = _HEADER.unpack_from(verdict.data)
    if well:
        return ""
    reason = bytes(verdict[_HEADER.size : _HEADER.size + min(length, VERDICT_BYTES)])
    return reason.decode(errors="replace") or "no reason was given"
