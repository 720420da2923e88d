# SPDX-License-Identifier: Apache-2.0
"""What moves (KVChunk) and where it is (DeviceSpec)."""

from __future__ import annotations

import msgspec


class DeviceSpec(msgspec.Struct, frozen=True):
    """Where memory is, or where a peer's is.

    ``kind`` is "cpu", "cuda", "npu", "mlu", "hip", "xpu"; ``index`` the device's
    number on its node. For a peer, ``addresses`` are those that its
    :class:`TransportEngine` listens on ("shm://…", "tcp://host:port"), any order,
    ``engine_id`` who must answer there ("" = anyone who knows the secret), and
    ``node`` its node's id (shm is only tried within one node).
    """

    kind: str = "cpu"
    index: int = 0
    numa_node: int = -1
    addresses: tuple[str, ...] = ()
    engine_id: str = ""
    node: str = ""


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """One run of memory: virtual address and length in bytes."""

    address: int
    length: int


class KVCoordinates(msgspec.Struct, frozen=True):
    """Which part of a request's KV: half-open ranges of global layers, kv heads and tokens.

    ``plane`` is the plane's name in the schema ("k", "v", "kv", "latent"); "" means all.
    """

    layers: tuple[int, int] = (0, 0)
    plane: str = ""
    heads: tuple[int, int] = (0, 0)
    tokens: tuple[int, int] = (0, 0)

    def key(self) -> str:
        """The same text on both sides for the same coordinates."""
        ranges = (self.layers, self.heads, self.tokens)
        return ".".join(f"{a}-{b}" for a, b in ranges) + f".{self.plane}"


class KVChunk(msgspec.Struct, frozen=True):
    """A piece of KV cache of one transfer, with the memory that holds or shall hold it.

    Both sides name the same ``transfer_id`` and ``coordinates``; ``payload`` is each
    side's own memory, in the same order of bytes, with equal totals but free cuts.
    ``priority``: lower goes first.
    """

    transfer_id: str
    payload: tuple[Segment, ...]
    coordinates: KVCoordinates = KVCoordinates()
    priority: int = 0

    @property
    def nbytes(self) -> int:
        return sum(segment.length for segment in self.payload)

    def key(self) -> str:
        return f"{self.transfer_id}/{self.coordinates.key()}"
