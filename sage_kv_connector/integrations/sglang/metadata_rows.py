# SPDX-License-Identifier: Apache-2.0
"""SGLang's metadata buffers: of each one row a request, with its first token and what belongs to it.

Nearly everywhere they are host memory, and the transport reads and writes them where they are. On Ascend SGLang keeps
them on the device. Then the transport works on a pinned copy: a row is copied by the device, in the background,
before it is offered and after it landed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import accumulate, count
from typing import Any, NamedTuple

import numpy as np

from sage_kv_connector.backends.base import Segments
from sage_kv_connector.devices.dma_lane import DmaLane
from sage_kv_connector.devices.runtime import Copies, CopyKind, DeviceMemory
from sage_kv_connector.integrations.common.compute_events import ComputeEvents
from sage_kv_connector.integrations.common.engine_methods import wrap_method

#: Rows of the pinned copy begin at multiples of this, so that any device's DMA takes them.
ALIGNMENT = 512
#: Called once with why a row could not be copied, "" if it was.
OnRow = Callable[[str], None]
_devices: dict[int, Any] = {}  #: torch's, by the address of a buffer


def follow_metadata_buffers() -> None:
    """Learn from SGLang, when it makes them, where metadata buffers lie: ``KVArgs`` has addresses alone."""
    wrap_method("sglang.srt.disaggregation.utils", "MetadataBuffers", "get_buf_infos", _heard)


def _heard(get_buf_infos: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any) -> Any:
        found = get_buf_infos(self)
        _devices[int(found[0][0])] = self.output_ids.device
        return found

    return wrapped


def on_device(kv_args: Any, device: Any) -> bool:
    """Whether metadata rows lie on the KV's ``device``, not in host memory.

    Raises ValueError for buffers that lie on another one, or that nobody knows the place of.
    """
    found = _devices.get(int(kv_args.aux_data_ptrs[0]))
    if found is None:
        raise ValueError(
            f"aux_data_ptrs: this SGLang does not tell where its metadata buffers lie, and KV lies on {device}; "
            "allowed: a release whose MetadataBuffers.get_buf_infos() makes KVArgs"
        )
    if found.type == "cpu":
        return False
    if found.type != device.type or (found.index or 0) != device.index:
        raise ValueError(f"metadata buffers lie on {found}, KV on {device}; allowed: cpu, {device}")
    return True


class _OnDevice(NamedTuple):
    """What moves rows between SGLang's buffers and the pinned copy."""

    memory: DeviceMemory
    computed: ComputeEvents
    pinned: int
    from_device: DmaLane
    to_device: DmaLane


class MetadataRows:
    """``device`` and ``computed``: of rows on a device; without them rows are host memory.

    The buffers are those of ``kv_args``; a request's row has the same number in all of them.
    """

    def __init__(
        self, kv_args: Any, device: DeviceMemory | None = None, computed: ComputeEvents | None = None
    ) -> None:
        self._theirs = [int(address) for address in kv_args.aux_data_ptrs]
        self._lengths = [int(length) for length in kv_args.aux_data_lens]
        self.row_bytes = [int(length) for length in kv_args.aux_item_lens]
        self._ours = self._theirs
        self._ids = count(1)
        self._then: dict[int, OnRow] = {}
        self._beginning = threading.Lock()  #: a copy, against its end before that
        self._on_device: _OnDevice | None = None
        if device is not None and computed is not None:
            ends = list(accumulate(-(-length // ALIGNMENT) * ALIGNMENT for length in self._lengths))
            pinned = device.runtime.host_alloc(device.number, ends[-1])
            self._ours = [pinned + begin for begin in (0, *ends[:-1])]
            lanes = [
                DmaLane(device.runtime, device.number, kind, self._copied)
                for kind in (CopyKind.DEVICE_TO_HOST, CopyKind.HOST_TO_DEVICE)
            ]
            self._on_device = _OnDevice(device, computed, pinned, *lanes)

    @property
    def rows(self) -> int:
        return self._lengths[0] // self.row_bytes[0]

    def extents(self) -> list[tuple[int, int]]:
        """(address, length) of what the transport uses: host memory, to be registered."""
        return list(zip(self._ours, self._lengths, strict=True))

    def segments(self, row: int) -> Segments:
        """(address, length) of one row in each buffer, where the transport uses it."""
        return np.array(_rows(self._ours, row, self.row_bytes), dtype=np.uint64)

    def expect(self) -> None:
        """SGLang's thread: what it launched so far may write a row that is to land; ``store`` waits for that."""
        if self._on_device is not None:
            self._on_device.computed.behind(_nothing, _nothing)

    def fetch(self, row: int, then: OnRow) -> int:
        """Take a row from SGLang that is final; ``then`` comes when ``segments`` hold it. Any thread.

        Returns what ``cancel`` takes. In host memory all is there at once.
        """
        if self._on_device is None:
            then("")
            return 0
        job = self._new(then)
        self._on_device.from_device.submit(job, self._copies(row, to_device=False))
        return job

    def store(self, row: int, then: OnRow) -> int:
        """Give SGLang a row that landed; ``then`` comes when it can be read there. As ``fetch``."""
        if (moving := self._on_device) is None:
            then("")
            return 0
        job = self._new(then)

        def begin() -> None:
            with self._beginning:
                if job in self._then:
                    moving.to_device.submit(job, self._copies(row, to_device=True))

        moving.computed.behind(begin, _nothing, ())
        return job

    def cancel(self, job: int) -> None:
        """When this returns the row is left alone, and ``then`` does not come, unless it is being called."""
        if self._on_device is not None:
            with self._beginning:
                self._then.pop(job, None)
            self._on_device.from_device.cancel(job)
            self._on_device.to_device.cancel(job)

    def close(self) -> None:
        """Nothing is copied any more. Idempotent."""
        moving, self._on_device = self._on_device, None
        if moving is not None:
            moving.from_device.close()
            moving.to_device.close()
            moving.memory.runtime.host_free(moving.memory.number, moving.pinned)

    def _new(self, then: OnRow) -> int:
        job = next(self._ids)
        self._then[job] = then
        return job

    def _copies(self, row: int, *, to_device: bool) -> Copies:
        ours, theirs = (_rows(begins, row, self.row_bytes) for begins in (self._ours, self._theirs))
        into, out_of = (theirs, ours) if to_device else (ours, theirs)
        copies = [(to, at, length) for (to, length), (at, _) in zip(into, out_of, strict=True)]
        return np.array(copies, dtype=np.uint64)

    def _copied(self, job: int, error: str) -> None:
        """A lane's thread."""
        then = self._then.pop(job, None)
        if then is not None:
            then(error)


def _rows(addresses: Sequence[int], row: int, lengths: Sequence[int]) -> list[tuple[int, int]]:
    return [(address + row * length, length) for address, length in zip(addresses, lengths, strict=True)]


def _nothing(_: str = "") -> None:
    """Behind an event that only keeps the order; where a device fails the copy after it fails too."""
