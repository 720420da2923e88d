# SPDX-License-Identifier: Apache-2.0
"""Memory in pieces for tests: items of several segments each, shuffled over one buffer."""

from __future__ import annotations

import numpy as np

from sage_kv_connector.backends.base import Segments
from sage_kv_connector.store.client import StoreClient


class Pages:
    """``count`` items of ``pieces`` segments of ``piece`` bytes each."""

    def __init__(
        self, client: StoreClient, count: int, piece: int, pieces: int = 2, seed: int | None = None
    ) -> None:
        """Registered with ``client``. Random bytes with a ``seed``, else zeros."""
        total = count * piece * pieces
        self.data = np.zeros(total, dtype=np.uint8)
        if seed is not None:
            self.data[:] = np.random.default_rng(seed).integers(0, 256, total, dtype=np.uint8)
        self._order = np.random.default_rng(count * piece).permutation(count * pieces).reshape(count, pieces)
        self._piece = piece
        client.register_memory([(int(self.data.ctypes.data), total)])

    @property
    def items(self) -> list[Segments]:
        base = int(self.data.ctypes.data)
        return [
            np.array([[base + int(at) * self._piece, self._piece] for at in row], dtype=np.uint64)
            for row in self._order
        ]

    def content(self, index: int) -> bytes:
        rows = self.data.reshape(-1, self._piece)
        return b"".join(rows[at].tobytes() for at in self._order[index])
