# SPDX-License-Identifier: Apache-2.0
"""Parts of a stream whose pages lie on a device: each one a job, asked for by the stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

from sage_kv_connector.backends.base import Event
from sage_kv_connector.engine.conversion.bounce import DeviceGroup
from sage_kv_connector.engine.conversion.jobs import OnConverted, PartCoder, PartStream, PoolEvent
from sage_kv_connector.format.converter import Span


class _Convert(Protocol):
    def __call__(self, group: DeviceGroup, span: Span, wire: int, length: int, done: OnConverted) -> int: ...


class DevicePartCoder:
    """``convert`` begins a job, ``cancel`` ends one. ``inner`` hands it the stream's events."""

    inner: PartCoder

    def __init__(
        self,
        stream: PartStream,
        groups: Mapping[int, DeviceGroup],
        convert: _Convert,
        cancel: Callable[[int], None],
        on_event: Callable[[Event], None],
    ) -> None:
        self._stream, self._groups = stream, groups
        self._convert, self._cancel = convert, cancel
        self._on_event = on_event
        self._jobs: dict[int, int] = {}

    def on_event(self, event: Event) -> None:
        if event.kind != PoolEvent.PART_TO_CONVERT:
            self._on_event(event)
            return
        part = event.offset
        group, span, wire, length = self._stream.asked(part)
        try:
            job = self._convert(
                self._groups[group], Span(*span), wire, length, partial(self._converted, part)
            )
        except ValueError as error:
            self._stream.answered(part, str(error))
        else:
            self._jobs[part] = job

    def close(self) -> None:
        for job in self._jobs.values():
            self._cancel(job)
        self._jobs.clear()
        self.inner.close()

    def _converted(self, part: int, error: str) -> None:
        self._jobs.pop(part, None)
        self._stream.answered(part, error)
