# SPDX-License-Identifier: Apache-2.0
"""Put and get of memory that is not registered: copied through a registered buffer of bounded size."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from sage_kv_connector.backends.base import Segments
from sage_kv_connector.store.client import StoreClient

logger = logging.getLogger(__name__)

#: Flat array of bytes.
Bytes = npt.NDArray[np.uint8]


class Bounce:
    """One buffer, used by one call at a time; an item that is larger than it is a miss."""

    def __init__(self, client: StoreClient, nbytes: int = 64 << 20) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._buffer = np.zeros(nbytes, dtype=np.uint8)
        client.register_memory([(int(self._buffer.ctypes.data), nbytes)])

    def put(self, keys: Sequence[str], values: Sequence[Bytes]) -> list[bool]:
        """As ``StoreClient.put``, from arrays anywhere."""
        kept = [False] * len(keys)
        with self._lock:
            for batch in self._batches(values):
                items = self._items([values[i] for i in batch])
                for index, (offset, length) in zip(batch, items, strict=True):
                    self._buffer[offset : offset + length] = values[index]
                flags = self._client.put([keys[i] for i in batch], self._segments(items))
                for index, flag in zip(batch, flags, strict=True):
                    kept[index] = flag
        return kept

    def get(self, keys: Sequence[str], targets: Sequence[Bytes]) -> list[bool]:
        """As ``StoreClient.get``, into arrays anywhere; those that missed are as they were."""
        landed = [False] * len(keys)
        with self._lock:
            for batch in self._batches(targets):
                items = self._items([targets[i] for i in batch])
                flags = self._client.get([keys[i] for i in batch], self._segments(items))
                for index, flag, (offset, length) in zip(batch, flags, items, strict=True):
                    landed[index] = flag
                    if flag:
                        targets[index][:] = self._buffer[offset : offset + length]
        return landed

    def _batches(self, arrays: Sequence[Bytes]) -> Iterator[list[int]]:
        batch: list[int] = []
        total = 0
        for index, array in enumerate(arrays):
            if not 0 < array.nbytes <= len(self._buffer):
                logger.warning(
                    "an item of %d bytes is left out: 1 to %d fit the buffer", array.nbytes, len(self._buffer)
                )
                continue
            if total + array.nbytes > len(self._buffer):
                yield batch
                batch, total = [], 0
            batch.append(index)
            total += array.nbytes
        if batch:
            yield batch

    @staticmethod
    def _items(arrays: Sequence[Bytes]) -> list[tuple[int, int]]:
        """(offset in the buffer, length) of each."""
        lengths = [array.nbytes for array in arrays]
        return list(zip(np.cumsum([0, *lengths[:-1]]).tolist(), lengths, strict=True))

    def _segments(self, items: Sequence[tuple[int, int]]) -> list[Segments]:
        base = int(self._buffer.ctypes.data)
        return [np.array([[base + offset, length]], dtype=np.uint64) for offset, length in items]
