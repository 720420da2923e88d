# SPDX-License-Identifier: Apache-2.0
"""What callers hand to ``send`` and ``recv``, as host memory that the data plane can read or write.

Taken are contiguous torch tensors in host memory, NumPy arrays and byte buffers as they are;
other tensors (on a device, strided) by a copy in host memory. Torch itself is not imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from sage_kv_connector.backends.base import Segments


class Tagged(NamedTuple):
    """A payload that is only paired with one of the same ``tag`` (up to 128 characters) on the other side.

    Messages without a tag are paired in the order of the calls, which threads that share a backend
    don't keep; a tag, such as a handle's id, makes the pairing theirs.
    """

    payload: Any
    tag: str


class HostMemory:
    """Host memory of one message. ``owner`` keeps it alive; ``finish`` puts what came where it belongs."""

    def __init__(
        self, address: int, nbytes: int, owner: object, finish: Callable[[], None] | None = None
    ) -> None:
        self.address, self.nbytes = address, nbytes
        self._owner = owner
        self._finish = finish

    @property
    def segments(self) -> Segments:
        return np.array([(self.address, self.nbytes)], dtype=np.uint64)

    def finish(self) -> None:
        """The bytes have landed: copy them on if this memory only stands in for the caller's."""
        if self._finish is not None:
            self._finish()


def to_send(payload: Any) -> HostMemory:
    """Memory that holds the payload's bytes. Raises ValueError naming the type that is not taken."""
    if hasattr(payload, "data_ptr"):
        tensor = payload.detach()
        if not _on_host(tensor):
            tensor = tensor.cpu()
        return _tensor_memory(tensor.contiguous())
    if isinstance(payload, np.ndarray):
        array = np.ascontiguousarray(payload)
        return HostMemory(array.ctypes.data, array.nbytes, array)
    return _buffer_memory(payload)


def to_receive(payload: Any) -> HostMemory:
    """Memory to be filled. Raises ValueError for a type that is not taken, and for memory that is read-only."""
    if hasattr(payload, "data_ptr"):
        if _on_host(payload) and payload.is_contiguous():
            return _tensor_memory(payload.detach())
        stand_in = payload.detach().cpu().clone().contiguous()

        def copy_on() -> None:
            payload.detach().copy_(stand_in)

        memory = _tensor_memory(stand_in)
        return HostMemory(memory.address, memory.nbytes, (payload, stand_in), copy_on)
    if isinstance(payload, np.ndarray):
        if not payload.flags.writeable:
            raise ValueError("the array to receive into is read-only")
        if payload.flags.c_contiguous:
            return HostMemory(payload.ctypes.data, payload.nbytes, payload)
        packed = np.empty(payload.shape, payload.dtype)

        def unpack() -> None:
            payload[...] = packed

        return HostMemory(packed.ctypes.data, packed.nbytes, (payload, packed), unpack)
    memory = _buffer_memory(payload, writable=True)
    return memory


def _on_host(tensor: Any) -> bool:
    return str(getattr(tensor, "device", "cpu")).partition(":")[0] == "cpu"


def _tensor_memory(tensor: Any) -> HostMemory:
    return HostMemory(int(tensor.data_ptr()), int(tensor.numel()) * int(tensor.element_size()), tensor)


def _buffer_memory(payload: Any, *, writable: bool = False) -> HostMemory:
    try:
        view = memoryview(payload).cast("B")
    except TypeError as error:
        raise ValueError(
            f"payload is a {type(payload).__name__}; allowed are torch tensors, NumPy arrays "
            "and contiguous buffers of bytes"
        ) from error
    if writable and view.readonly:
        raise ValueError(f"the {type(payload).__name__} to receive into is read-only; allowed: bytearray")
    array = np.frombuffer(view, dtype=np.uint8)  # holds the export: a bytearray can't be resized meanwhile
    return HostMemory(array.ctypes.data if array.size else 0, array.nbytes, array)
