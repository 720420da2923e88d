# SPDX-License-Identifier: Apache-2.0
"""Conversion straight from a peer's pages to ours, by kernels of this device: nothing is staged in host memory.

A part is two launches: one makes its wire bytes of the peer's pages, in a buffer on this device, and one makes our
pages of these. So every bit is what it is where both sides convert. The peer only holds its pages. Control thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sage_kv_connector.contract.dtypes import DTYPE_BITS
from sage_kv_connector.contract.peer_view import PEER_PAGES, view_of_peer
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.devices.runtime import DeviceRuntime, Launch
from sage_kv_connector.engine.conversion.bounce import DeviceGroup, device_group
from sage_kv_connector.engine.conversion.device_kernels import DeviceKernels
from sage_kv_connector.engine.conversion.device_rooms import READ_BYTES
from sage_kv_connector.engine.conversion.part_plan import Parts
from sage_kv_connector.engine.conversion.peer_pages import Box, PeerPages, of_canonical
from sage_kv_connector.engine.conversion.wire_plan import Formats, LayerRun, converted_planes
from sage_kv_connector.format.converter import Span
from sage_kv_connector.kernels.registry import PagedGroup


class ReadGroup(NamedTuple):
    """One group on both sides; ``tokens``: what is wanted, ``pages_of``: our page ids that hold tokens."""

    theirs: DeviceGroup
    ours: DeviceGroup
    runs: tuple[LayerRun, ...]
    tokens: range
    pages_of: Callable[[int, int], list[int]]

    @property
    def page_size(self) -> int:
        """Tokens of the peer's page."""
        return self.theirs.view.page_size * self.theirs.split

    @property
    def pages(self) -> range:
        """The peer's pages that hold the tokens, by their place in the request."""
        return range(self.tokens.start // self.page_size, -(-self.tokens.stop // self.page_size))


class Heads(NamedTuple):
    """Of a transfer: the first on each side, and how many."""

    theirs: int
    ours: int
    number: int


def runtime_lacks(runtime: DeviceRuntime) -> str:
    """Why its kernels can't read the memory of a peer on this node, "" if they can."""
    features = runtime.features
    if not features.ipc:
        return f"{runtime.api} opens no memory of other processes"
    return (
        "" if features.kernels_read_peers else f"kernels of {runtime.api} read no memory of other processes"
    )


class PeerReads:
    """Of one engine. ``buffer``: of ``READ_BYTES`` on the device, 0 if there is none."""

    def __init__(self, runtime: DeviceRuntime, kernels: DeviceKernels, buffer: int) -> None:
        self._kernels = kernels
        self.buffer = buffer
        self._lacks = runtime_lacks(runtime)
        if not (self._lacks or buffer):
            self._lacks = f"no room on the device for a buffer of {READ_BYTES} bytes"

    @property
    def lacks(self) -> str:
        """Why nothing is converted from where a peer has it, "" if it may be."""
        return self._kernels.lacks or self._lacks

    def of_peer(
        self, index: int, formats: Formats, ours: KVCacheSchema, theirs: KVCacheSchema
    ) -> DeviceGroup:
        """A peer's group with the kernels that encode it. Raises ValueError naming what stands in the way."""
        if not formats:
            raise ValueError(f"pages of group {index} go as they are")
        view = view_of_peer(theirs.groups[index], DTYPE_BITS[theirs.dtype] // 8)
        group = device_group(view, theirs.dtype, converted_planes(view, index, formats, theirs, ours, theirs))
        paged = PagedGroup(theirs.dtype, group.view.page_size, PEER_PAGES, group.view.heads, group.planes)
        return group._replace(kernels=self._kernels.of_peer(paged))


class PartReads:
    """One transfer: ``read`` is what its window calls, ``nbytes`` the window's size.

    ``parts`` name our layers. Raises ValueError for a part that the buffer has no room for.
    """

    def __init__(self, parts: Parts, groups: dict[int, ReadGroup], heads: Heads, buffer: int) -> None:
        if (largest := int(parts[:, 5].max())) > READ_BYTES:
            raise ValueError(f"a part has {largest} bytes, the buffer {READ_BYTES}")
        self._groups, self._heads, self._buffer = groups, heads, buffer
        self._pages: dict[int, PeerPages] = {}
        at = 0
        for index, group in groups.items():
            self._pages[index] = PeerPages(group.theirs.view, len(group.pages), at)
            at = self._pages[index].end
        self.nbytes = at
        self._parts = parts.tolist()
        self._boxes = [self._box(*row) for row in self._parts]
        # group, first layer, behind the last, first page, behind the last; group -1 once it began
        self._open = np.array(
            [(row[0], *layers, *pages) for row, (layers, pages) in zip(self._parts, self._boxes, strict=True)]
        )

    def read(self, rows: npt.NDArray[np.uint64]) -> list[Sequence[Launch]]:
        """Launches of each part that can be made now. Raises ValueError for offers that make no pages."""
        found: list[Sequence[Launch]] = []
        for index, pages in self._pages.items():
            touched = pages.take(rows)
            if touched is None:
                continue
            (layer, end), (page, last) = touched
            known = self._open
            near = (known[:, 0] == index) & (known[:, 1] < end) & (known[:, 2] > layer)
            near &= (known[:, 3] < last) & (known[:, 4] > page)
            for part in np.flatnonzero(near).tolist():
                if pages.whole(self._boxes[part]):
                    known[part, 0] = -1
                    found.append(self._launches(part, pages))
        return found

    def _box(self, index: int, first_layer: int, layers: int, first_token: int, tokens: int, _: int) -> Box:
        group = self._groups[index]
        run = next(run for run in group.runs if run.local <= first_layer < run.local + run.layers)
        layer = run.peer + first_layer - run.local
        size, first = group.page_size, group.pages.start
        page, last = first_token // size - first, -(-(first_token + tokens) // size) - first
        return (layer, layer + layers), (page, last)

    def _launches(self, part: int, pages: PeerPages) -> list[Launch]:
        index, first_layer, layers, first_token, tokens, nbytes = self._parts[part]
        group, box, heads = self._groups[index], self._boxes[part], self._heads
        theirs, ours = group.theirs, group.ours
        assert theirs.kernels is not None and ours.kernels is not None
        bases, ids = pages.placed(box)
        here = group.pages_of(first_token, tokens)
        there = Span(box[0][0], layers, heads.theirs, heads.number, first_token, tokens, ids)
        to = Span(first_layer, layers, heads.ours, heads.number, first_token, tokens, here)
        made: list[Launch] = []
        made += theirs.kernels.launches(
            "encode", theirs.in_blocks(there), self._buffer, nbytes, of_canonical(bases, theirs.view)
        )
        made += ours.kernels.launches("decode", ours.in_blocks(to), self._buffer, nbytes)
        return made
