# SPDX-License-Identifier: Apache-2.0
"""What a backend may have beside the contract: lanes that take part in a conversion.

A transfer whose pages differ comes in parts, through slots of staging memory in host memory on both sides. Lanes send
each part once it is encoded, and each that landed is decoded, without the interpreter (``csrc/parts/part_stream.h``).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from sage_kv_connector import _data_plane


class Ring(NamedTuple):
    """Staging memory of one transfer: ``slots`` of ``slot_bytes`` each from ``address`` on, registered."""

    address: int
    slot_bytes: int
    slots: int

    @property
    def nbytes(self) -> int:
        return self.slot_bytes * self.slots


class ConvertingBackend(Protocol):
    """What a Backend with ``parts`` has beside."""

    def open_part_window(
        self, connection: int, decoder: _data_plane.PartDecoder, ring: Ring, generation: int
    ) -> int:
        """As ``open_window``, over all parts of a transfer; the peer may fill those that the decoder granted.

        Its PARTS_DONE says when the pages are filled; WINDOW_DONE comes before that.
        """
        ...

    def post_parts(
        self,
        connection: int,
        window_descriptor: bytes,
        encoder: _data_plane.PartEncoder,
        ring: Ring,
        generation: int,
        *,
        priority: int = 0,
        checksum: bool = True,
    ) -> int:
        """As ``post``, of all parts, each as soon as it is granted, final and encoded into ``ring``.

        SENT says BEYOND_END and OUT_OF_BOUNDS as for ``post_pages``, NOT_CONVERTED where a conversion failed.
        """
        ...
