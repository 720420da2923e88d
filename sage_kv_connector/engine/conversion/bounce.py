# SPDX-License-Identifier: Apache-2.0
"""Which bytes of device pages a box of KV covers, and where they lie in a host copy of those pages.

A box is some layers of some heads of some tokens of a request, as ``Span`` says it. Its
*bounce* is host memory with images of the same pages one after the other, layer after layer.
Planes that share their pages, such as K and V side by side, share an image. Elements keep their
places inside it, so the CPU converters read and write it like any other cache. Only the box's bytes
are copied, the rest of a page is others', in as few copies as they allow: a page that is needed
whole is one, and pages that follow one another are one together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sage_kv_connector.contract.cache_view import GroupView
from sage_kv_connector.contract.dtypes import DTYPE_BITS
from sage_kv_connector.contract.element_order import ElementOrder, strided
from sage_kv_connector.devices.runtime import Copies
from sage_kv_connector.format.converter import ConvertedPlane, GroupConverter, Span
from sage_kv_connector.kernels.registry import GroupKernels

Places = npt.NDArray[np.int64]

#: Pages of a bounce begin at multiples of this many bytes, which every vendor's DMA takes.
BOUNCE_ALIGNMENT = 256


class DeviceGroup(NamedTuple):
    """A group of pages on a device, how its planes stand on the wire, and the device's kernels if they convert it.

    Without planes its pages go as they are. ``split``: of the engine's pages each is so many here, the blocks of its
    attention kernels.
    """

    view: GroupView
    dtype: str
    planes: tuple[ConvertedPlane, ...]
    kernels: GroupKernels | None = None
    split: int = 1

    def in_blocks(self, span: Span) -> Span:
        """The same box, its pages those of this group. ``span`` names the engine's."""
        if self.split == 1:
            return span
        size = self.view.page_size
        first, end = span.first_token // size, -(-(span.first_token + span.tokens) // size)
        ids = np.asarray(span.pages, dtype=np.int64)[:, None] * self.split + np.arange(self.split)
        skipped = first % self.split
        return span._replace(pages=ids.reshape(-1)[skipped : skipped + end - first].tolist())


def device_group(view: GroupView, dtype: str, planes: Sequence[ConvertedPlane]) -> DeviceGroup:
    """Of pages that hold smaller blocks one after the other, each block is a page of its own."""
    tile = planes[0].order.token[0]
    split, left = divmod(view.page_size, tile)
    alike = all(
        plane.order.token[0] == tile and plane.order.token[2] * split == plane.page_stride for plane in planes
    )
    if split < 2 or left or not alike:
        return DeviceGroup(view, dtype, tuple(planes))
    inside = []
    for plane in planes:
        _, token, block = plane.order.token
        plain = plane.order._replace(token=strided(0, 0, token, 0).token)
        inside.append(plane._replace(order=plain, page_stride=block))
    smaller = view._replace(page_size=tile, pages=view.pages * split)
    return DeviceGroup(smaller, dtype, tuple(inside), split=split)


class Bounce(NamedTuple):
    """Host memory for one box at ``address``: what to copy, and how to convert it there."""

    nbytes: int
    converter: GroupConverter
    span: Span
    #: uint64 (n, 3): device address, host address, bytes
    pairs: npt.NDArray[np.uint64]

    def to_host(self) -> Copies:
        return np.ascontiguousarray(self.pairs[:, [1, 0, 2]])

    def to_device(self) -> Copies:
        return self.pairs


class _Image(NamedTuple):
    """Pages that some planes share: from ``first`` to ``end`` of a page; each takes ``stride`` bytes of a bounce.

    Where other pages or layers lie between two heads, these are offsets of one head, and ``heads`` such follow each
    other, on the device ``head_stride`` apart.
    """

    planes: list[int]
    first: int
    end: int
    heads: int = 1
    head_stride: int = 0

    @property
    def head_bytes(self) -> int:
        return self.end - self.first

    @property
    def stride(self) -> int:
        return -(-self.heads * self.head_bytes // BOUNCE_ALIGNMENT) * BOUNCE_ALIGNMENT


def page_bytes(order: ElementOrder, page_size: int, heads: int, dim: int, item: int) -> int:
    """Bytes from the first to the last element of one page of a plane."""
    return (page_size - 1) * order.token[1] + (heads - 1) * order.head_stride + dim * item


def bounce_bytes(group: DeviceGroup, span: Span) -> int:
    """Host memory that ``bounce`` of this box needs."""
    return span.layers * len(span.pages) * sum(image.stride for image in _images(group))


def bounce(group: DeviceGroup, span: Span, address: int) -> Bounce:
    """The box ``span`` of ``group`` in host memory at ``address``.

    Raises ValueError for pages whose order is packed: there is none such on an accelerator.
    """
    count = len(span.pages)
    images = _images(group)
    runs = [_page_runs(group, image, span) for image in images]
    ids = np.asarray(span.pages, dtype=np.int64)
    pairs = []
    at = address
    bases: list[list[int]] = [[] for _ in group.planes]
    for layer in range(span.first_layer, span.first_layer + span.layers):
        for image, (places, offsets, inside, lengths) in zip(images, runs, strict=True):
            plane = group.planes[image.planes[0]]
            for number in image.planes:
                bases[number].append(at)
            device = plane.bases[layer] + ids[places] * plane.page_stride + offsets
            host = at + places * image.stride + inside
            pairs.append(_joined(device, host, lengths))
            at += count * image.stride
    layers = slice(span.first_layer, span.first_layer + span.layers)
    planes = list(group.planes)
    for image in images:
        for number in image.planes:
            plane = planes[number]
            order = plane.order._replace(offset=plane.order.offset - image.first)
            if image.heads > 1:
                order = order._replace(head_stride=image.head_bytes)
            planes[number] = plane._replace(
                order=order,
                page_stride=image.stride,
                bases=bases[number],
                memory_scales=plane.memory_scales[layers],
                wire_scales=plane.wire_scales[layers],
            )
    view = group.view
    converter = GroupConverter(group.dtype, view.page_size, count, view.heads, planes)
    within = span._replace(first_layer=0, pages=range(count))
    return Bounce(at - address, converter, within, np.concatenate(pairs))


def copied_pages(group: DeviceGroup, span: Span, wire: int, length: int) -> npt.NDArray[np.uint64]:
    """Whole pages of some layers, of a group without planes, and their places at ``wire``; as ``Bounce.pairs``.

    Raises ValueError for another length than they have.
    """
    ids = np.asarray(span.pages, dtype=np.int64)
    layers = group.view.layers[span.first_layer : span.first_layer + span.layers]
    runs = np.concatenate([layer.page_segments(ids) for layer in layers]).astype(np.int64)
    ends = np.cumsum(runs[:, 1])
    if int(ends[-1]) != length:
        raise ValueError(f"wire has {length} bytes, the pages {int(ends[-1])}")
    return _joined(runs[:, 0], wire + ends - runs[:, 1], runs[:, 1])


def _images(group: DeviceGroup) -> list[_Image]:
    item = DTYPE_BITS[group.dtype] // 8
    found: list[_Image] = []
    for number, plane in enumerate(group.planes):
        heads, order = group.view.heads, plane.order
        apart = heads > 1 and order.head_stride > group.view.page_size * order.token[1]
        size = page_bytes(order, group.view.page_size, 1 if apart else heads, plane.dim, item)
        own = _Image([number], order.offset, order.offset + size)
        if apart:
            own = own._replace(heads=heads, head_stride=order.head_stride)
        for index, image in enumerate(found):
            other = group.planes[image.planes[0]]
            both = own._replace(
                planes=[*image.planes, number],
                first=min(own.first, image.first),
                end=max(own.end, image.end),
            )
            alike = (own.heads, own.head_stride) == (image.heads, image.head_stride)
            one_page = both.head_bytes <= plane.page_stride == other.page_stride
            if alike and one_page and list(plane.bases) == list(other.bases):
                found[index] = both
                break
        else:
            found.append(own)
    return found


def _page_runs(group: DeviceGroup, image: _Image, span: Span) -> tuple[Places, Places, Places, Places]:
    """Runs of the box in an image's pages: place of the page, offset in it and in its image, bytes; page after page."""
    size = group.view.page_size
    end = span.first_token + span.tokens
    origin = span.first_token // size
    places, offsets, images, lengths = [], [], [], []
    index = 0
    while index < len(span.pages):
        begin = (origin + index) * size
        first, last = max(span.first_token, begin) - begin, min(end, begin + size) - begin
        # Whole pages have their runs in common.
        whole = first == 0 and last == size
        count = (end // size - origin - index) if whole else 1
        there, here, run = _box_in_image(group, image, span, first, last - first)
        places.append(np.repeat(np.arange(index, index + count, dtype=np.int64), len(there)))
        offsets.append(np.tile(there, count))
        images.append(np.tile(here, count))
        lengths.append(np.tile(run, count))
        index += count
    return np.concatenate(places), np.concatenate(offsets), np.concatenate(images), np.concatenate(lengths)


def _box_in_image(
    group: DeviceGroup, image: _Image, span: Span, first_token: int, tokens: int
) -> tuple[Places, Places, Places]:
    """Offset in a page and in its image, and bytes, of each run in one page; those of planes that touch are one."""
    item = DTYPE_BITS[group.dtype] // 8
    first_head, heads = (0, 1) if image.heads > 1 else (span.first_head, span.heads)
    offsets, lengths = [], []
    for number in image.planes:
        plane = group.planes[number]
        runs, nbytes = box_runs(plane.order, plane.dim, item, first_head, heads, first_token, tokens)
        offsets.append(runs + plane.order.offset)
        lengths.append(np.full(len(runs), nbytes, dtype=np.int64))
    all_offsets, all_lengths = np.concatenate(offsets), np.concatenate(lengths)
    ascending = np.argsort(all_offsets, kind="stable")
    joined = _joined(all_offsets[ascending], all_offsets[ascending], all_lengths[ascending])
    there, run = joined[:, 0].astype(np.int64), joined[:, 2].astype(np.int64)
    here = there - image.first
    if image.heads > 1:
        each = np.arange(span.first_head, span.first_head + span.heads, dtype=np.int64)[:, None]
        there = (each * image.head_stride + there).reshape(-1)
        here = (each * image.head_bytes + here).reshape(-1)
        run = np.tile(run, span.heads)
    return there, here, run


def _joined(device: Places, host: Places, lengths: Places) -> npt.NDArray[np.uint64]:
    """uint64 (n, 3) of device address, host address, bytes; neighbours that touch on both sides are one."""
    begins = np.ones(len(device), dtype=bool)
    begins[1:] = (device[:-1] + lengths[:-1] != device[1:]) | (host[:-1] + lengths[:-1] != host[1:])
    at = np.flatnonzero(begins)
    pairs = np.empty((len(at), 3), dtype=np.uint64)
    pairs[:, 0], pairs[:, 1], pairs[:, 2] = device[at], host[at], np.add.reduceat(lengths, at)
    return pairs


def box_runs(
    order: ElementOrder, dim: int, item: int, first_head: int, heads: int, first_token: int, tokens: int
) -> tuple[npt.NDArray[np.int64], int]:
    """Offsets in a page of the runs that hold a box, and the bytes of each run.

    ``item``: bytes of an element. Raises ValueError for packed orders and for channels that are not neighbours.
    """
    token_tile, token_stride, token_outer = order.token
    channel_tile, channel_stride, channel_outer = order.channel
    if (
        channel_stride != item
        or channel_outer != channel_tile * item
        or token_outer != token_tile * token_stride
    ):
        raise ValueError(
            f"order of elements: tokens {order.token}, channels {order.channel} is packed; "
            "pages on a device must have strided tokens of whole rows"
        )
    start = first_head * order.head_stride + first_token * token_stride
    axes = sorted([(order.head_stride, heads), (token_stride, tokens)])
    run = dim * item
    offsets = np.full(1, start, dtype=np.int64)
    for stride, count in axes:
        if count == 1:
            continue
        if stride == run and len(offsets) == 1:
            run *= count
        else:
            offsets = (np.arange(count, dtype=np.int64)[:, None] * stride + offsets[None, :]).reshape(-1)
    return offsets, run
