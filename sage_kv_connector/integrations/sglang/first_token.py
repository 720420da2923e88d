# SPDX-License-Identifier: Apache-2.0
"""The first token of a prefill that is not SGLang's, written into SGLang's metadata buffers on decode.

SGLang's own prefill sends its row of them as it is. Another engine sends the token alone; it lands in
a slot of ours first, and ``commit`` writes the row that SGLang reads: token and room, all else 0
(so cached tokens and the first token's logprobs are reported as 0).
"""

from __future__ import annotations

import ctypes

import numpy as np

from sage_kv_connector.backends.base import Segments
from sage_kv_connector.integrations.sglang.metadata_rows import MetadataRows

#: Bytes of a row of token ids, and of one of rooms (sglang 0.5.23, ``MetadataBuffers``).
_ROW_BYTES = 64


class FirstTokenSlots:
    """One slot for each row of the metadata buffers; ``room_buffer`` is the index of the rooms' among them.

    Raises ValueError naming the buffer whose rows are not what ``commit`` writes.
    """

    def __init__(self, rows: MetadataRows, room_buffer: int) -> None:
        lengths = rows.row_bytes
        room_buffer %= len(lengths)
        for name, index in (("output_ids", 0), ("bootstrap_room", room_buffer)):
            if lengths[index] != _ROW_BYTES:
                raise ValueError(
                    f"metadata buffer {index} ({name}) has rows of {lengths[index]} bytes, "
                    f"expected {_ROW_BYTES}: this SGLang can't decode what another engine prefilled"
                )
        self._rows = rows
        self._room_buffer = room_buffer
        self._slots = np.zeros(rows.rows, dtype=np.int64)

    def extent(self) -> tuple[int, int]:
        """(address, length) of all slots, to be registered."""
        return self._slots.ctypes.data, self._slots.nbytes

    def segments(self, row: int) -> Segments:
        """Where the token of metadata row ``row`` lands."""
        return np.array([[self._slots.ctypes.data + 8 * row, 8]], dtype=np.uint64)

    def commit(self, row: int, room: int) -> None:
        """Make a row of metadata of what landed for ``row``. Raises ValueError for what is no token id."""
        token = int(self._slots[row])
        if not 0 <= token < 1 << 31:
            raise ValueError(f"the first token is {token}, allowed: 0 to {(1 << 31) - 1}")
        rows = self._rows.segments(row).tolist()
        for address, length in rows:
            ctypes.memset(address, 0, length)
        ctypes.c_int32.from_address(rows[0][0]).value = token
        # Last: a room that is not 0 tells SGLang that the row is complete.
        ctypes.c_uint64.from_address(rows[self._room_buffer][0]).value = room
