# SPDX-License-Identifier: Apache-2.0
"""What two ``pcie`` backends say to each other over their control connection: MessagePack arrays, tag first."""

from __future__ import annotations

import msgspec
import numpy as np

from sage_kv_connector.backends.base import Descriptors

#: Most copies that one Offered names: 24 bytes each, below any backend's longest message.
MAX_COPIES = 4096
MAX_HANDLE_BYTES = 1024
MAX_DETAIL = 1024
MAX_UINT64 = (1 << 64) - 1


class PcieProtocolError(Exception):
    """A peer said something that is not allowed here."""


class Greeting(msgspec.Struct, tag="hi", array_like=True, frozen=True):
    """First message of each side. ``probe``: a handle the other side must be able to open."""

    vendor: str
    process: int
    probe: bytes


class Upper(msgspec.Struct, tag="m", array_like=True, frozen=True):
    """A message of the layer above."""

    payload: bytes


class Offered(msgspec.Struct, tag="o", array_like=True, frozen=True):
    """Sender → receiver: take these bytes out of my device memory.

    ``handles[i]`` opens allocation i of ``sizes[i]`` bytes; ``table`` holds uint64 rows
    (allocation, offset in it, offset in the window, length).
    """

    post: int
    part: int
    window: int
    generation: int
    handles: tuple[bytes, ...]
    sizes: tuple[int, ...]
    table: bytes


class Taken(msgspec.Struct, tag="t", array_like=True, frozen=True):
    """Receiver → sender: a part of a post ended; its memory is not read any more."""

    post: int
    part: int
    status: int
    detail: str


class Revoked(msgspec.Struct, tag="x", array_like=True, frozen=True):
    """Sender → receiver: what was not taken of this post must not count."""

    post: int


Message = Greeting | Upper | Offered | Taken | Revoked
_decoder = msgspec.msgpack.Decoder(Message)
encode = msgspec.msgpack.Encoder().encode


def decode(payload: bytes) -> Message:
    """Raises PcieProtocolError naming what is wrong."""
    try:
        message: Message = _decoder.decode(payload)
    except (
        msgspec.MsgspecError,
        UnicodeDecodeError,
        RecursionError,
    ) as error:  # a tag that is no text; too deep
        raise PcieProtocolError(f"not a message of the pcie backend: {str(error)[:MAX_DETAIL]!a}") from error
    if isinstance(message, Offered):
        rows = len(message.table) // 32
        if len(message.table) % 32 or not 0 < rows <= MAX_COPIES:
            raise PcieProtocolError(
                f"table has {len(message.table)} bytes, allowed: 1 to {MAX_COPIES} rows of 32"
            )
        if len(message.handles) != len(message.sizes) or any(
            len(handle) > MAX_HANDLE_BYTES for handle in message.handles
        ):
            raise PcieProtocolError("handles and sizes don't fit together")
        if not all(0 < size <= MAX_UINT64 for size in message.sizes):
            raise PcieProtocolError(f"sizes are {message.sizes[:4]} …, allowed: 1 to 2**64 - 1")
    return message


def rows_of(message: Offered) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
    """The table, checked against the sizes. Raises PcieProtocolError naming the row."""
    rows = np.frombuffer(message.table, dtype="<u8").reshape(-1, 4)
    sizes = np.asarray(message.sizes, dtype=np.uint64)
    if (rows[:, 0] >= len(sizes)).any():
        raise PcieProtocolError(f"a copy names allocation {int(rows[:, 0].max())} of {len(sizes)}")
    limit = sizes[rows[:, 0].astype(np.int64)]
    wrong = (rows[:, 3] == 0) | (rows[:, 1] > limit) | (rows[:, 3] > limit - np.minimum(rows[:, 1], limit))
    if wrong.any():
        row = rows[int(np.flatnonzero(wrong)[0])]
        raise PcieProtocolError(f"a copy of {row[3]} bytes at {row[1]} leaves its allocation")
    return rows


def table_of(allocations: Descriptors, descriptors: Descriptors, index: list[int]) -> bytes:
    """Rows for descriptors (address, window offset, length) whose allocation number ``index`` tells.

    ``allocations``: (base, length) rows.
    """
    rows = np.empty((len(descriptors), 4), dtype="<u8")
    rows[:, 0] = index
    rows[:, 1] = descriptors[:, 0] - allocations[np.asarray(index), 0]
    rows[:, 2], rows[:, 3] = descriptors[:, 1], descriptors[:, 2]
    return rows.tobytes()
