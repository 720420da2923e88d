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

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sage_kv_connector.contract.cache_view import GroupView
from sage_kv_connector.contract.dtypes import DTYPE_BITS
from sage_kv_connector.contract.element_order import ElementOrder
from sage_kv_connector.devices.runtime import Copies
from sage_kv_connector.format.converter import ConvertedPlane, GroupConverter, Span
from sage_kv_connector.kernels.registry import GroupKernels

Places = npt.NDArray[np.int64]

#: Pages of a bounce begin at multiples of this many bytes, which every vendor's DMA takes.
BOUNCE_ALIGNMENT = 256


class DeviceGroup(NamedTuple):
    """A group of pages on a device, how its planes stand on the wire, and the device's kernels if they convert it."""

    view: GroupView
    dtype: str
    planes: tuple[ConvertedPlane, ...]
    kernels: GroupKernels | None = None


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
    """Pages that some planes share: from ``first``, an offset in a page, they take ``stride`` bytes of a bounce."""

    planes: list[int]
    first: int
    end: int

    @property
    def stride(self) -> int:
        return -(-(self.end - self.first) // BOUNCE_ALIGNMENT) * BOUNCE_ALIGNMENT


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
        for image, (places, offsets, lengths) in zip(images, runs, strict=True):
            plane = group.planes[image.planes[0]]
            for number in image.planes:
                bases[number].append(at)
            device = plane.bases[layer] + ids[places] * plane.page_stride + offsets
            host = at - image.first + places * image.stride + offsets
            pairs.append(_joined(device, host, lengths))
            at += count * image.stride
    layers = slice(span.first_layer, span.first_layer + span.layers)
    planes = list(group.planes)
    for image in images:
        for number in image.planes:
            plane = planes[number]
            planes[number] = plane._replace(
                order=plane.order._replace(offset=plane.order.offset - image.first),
                page_stride=image.stride,
                bases=bases[number],
                memory_scales=plane.memory_scales[layers],
                wire_scales=plane.wire_scales[layers],
            )
    view = group.view
    converter = GroupConverter(group.dtype, view.page_size, count, view.heads, planes)
    inside = span._replace(first_layer=0, pages=range(count))
    return Bounce(at - address, converter, inside, np.concatenate(pairs))


def _images(group: DeviceGroup) -> list[_Image]:
    item = DTYPE_BITS[group.dtype] // 8
    found: list[_Image] = []
    for number, plane in enumerate(group.planes):
        size = page_bytes(plane.order, group.view.page_size, group.view.heads, plane.dim, item)
        first, end = plane.order.offset, plane.order.offset + size
        for index, image in enumerate(found):
            other = group.planes[image.planes[0]]
            both = _Image([*image.planes, number], min(first, image.first), max(end, image.end))
            one_page = both.end - both.first <= plane.page_stride == other.page_stride
            if one_page and list(plane.bases) == list(other.bases):
                found[index] = both
                break
        else:
            found.append(_Image([number], first, end))
    return found


def _page_runs(group: DeviceGroup, image: _Image, span: Span) -> tuple[Places, Places, Places]:
    """Runs of the box in an image's pages: place of the page, offset in it, bytes; page after page, ascending."""
    size = group.view.page_size
    end = span.first_token + span.tokens
    origin = span.first_token // size
    places, offsets, lengths = [], [], []
    index = 0
    while index < len(span.pages):
        begin = (origin + index) * size
        first, last = max(span.first_token, begin) - begin, min(end, begin + size) - begin
        # Whole pages have their runs in common.
        whole = first == 0 and last == size
        count = (end // size - origin - index) if whole else 1
        inside, run = _box_in_image(group, image, span, first, last - first)
        places.append(np.repeat(np.arange(index, index + count, dtype=np.int64), len(inside)))
        offsets.append(np.tile(inside, count))
        lengths.append(np.tile(run, count))
        index += count
    return np.concatenate(places), np.concatenate(offsets), np.concatenate(lengths)


def _box_in_image(
    group: DeviceGroup, image: _Image, span: Span, first_token: int, tokens: int
) -> tuple[Places, Places]:
    """Offset and bytes of each run in one page; those of planes that touch are one."""
    item = DTYPE_BITS[group.dtype] // 8
    offsets, lengths = [], []
    for number in image.planes:
        plane = group.planes[number]
        runs, nbytes = box_runs(
            plane.order, plane.dim, item, span.first_head, span.heads, first_token, tokens
        )
        offsets.append(runs + plane.order.offset)
        lengths.append(np.full(len(runs), nbytes, dtype=np.int64))
    all_offsets, all_lengths = np.concatenate(offsets), np.concatenate(lengths)
    ascending = np.argsort(all_offsets, kind="stable")
    joined = _joined(all_offsets[ascending], all_offsets[ascending], all_lengths[ascending])
    return joined[:, 0].astype(np.int64), joined[:, 2].astype(np.int64)


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
