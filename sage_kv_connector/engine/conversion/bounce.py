# SPDX-License-Identifier: Apache-2.0
"""Which bytes of device pages a box of KV covers, and where they lie in a host copy of those pages.

A box is some layers of some heads of some tokens of a request, as ``Span`` says it. Its
*bounce* is host memory with the same pages one after the other, layer after layer, plane
after plane; elements keep their places inside a page, so the CPU converters read and write
it like any other cache. Only the box's bytes are copied: the rest of a page is others'.
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

#: Pages of a bounce begin at multiples of this many bytes, which every vendor's DMA takes.
BOUNCE_ALIGNMENT = 256


class DeviceGroup(NamedTuple):
    """A group of pages on a device, and how its planes stand on the wire."""

    view: GroupView
    dtype: str
    planes: tuple[ConvertedPlane, ...]


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


def page_bytes(order: ElementOrder, page_size: int, heads: int, dim: int, item: int) -> int:
    """Bytes from the first to the last element of one page of a plane."""
    return (page_size - 1) * order.token[1] + (heads - 1) * order.head_stride + dim * item


def bounce_bytes(group: DeviceGroup, span: Span) -> int:
    """Host memory that ``bounce`` of this box needs."""
    return span.layers * sum(len(span.pages) * stride for stride in _strides(group))


def bounce(group: DeviceGroup, span: Span, address: int) -> Bounce:
    """The box ``span`` of ``group`` in host memory at ``address``.

    Raises ValueError for pages whose order is packed: there is none such on an accelerator.
    """
    item = DTYPE_BITS[group.dtype] // 8
    count = len(span.pages)
    strides = _strides(group)
    planes, pairs = [], []
    at = address
    bases: list[list[int]] = [[] for _ in strides]
    for layer in range(span.first_layer, span.first_layer + span.layers):
        for number, (plane, stride) in enumerate(zip(group.planes, strides, strict=True)):
            bases[number].append(at)
            pairs.append(_page_pairs(group, plane, span, plane.bases[layer], at, stride, item))
            at += count * stride
    layers = slice(span.first_layer, span.first_layer + span.layers)
    for number, (plane, stride) in enumerate(zip(group.planes, strides, strict=True)):
        planes.append(
            plane._replace(
                order=plane.order._replace(offset=0),
                page_stride=stride,
                bases=bases[number],
                memory_scales=plane.memory_scales[layers],
                wire_scales=plane.wire_scales[layers],
            )
        )
    view = group.view
    converter = GroupConverter(group.dtype, view.page_size, count, view.heads, planes)
    inside = span._replace(first_layer=0, pages=range(count))
    return Bounce(at - address, converter, inside, np.concatenate(pairs))


def _strides(group: DeviceGroup) -> list[int]:
    item = DTYPE_BITS[group.dtype] // 8
    sizes = [
        page_bytes(plane.order, group.view.page_size, group.view.heads, plane.dim, item)
        for plane in group.planes
    ]
    return [-(-size // BOUNCE_ALIGNMENT) * BOUNCE_ALIGNMENT for size in sizes]


def _page_pairs(
    group: DeviceGroup, plane: ConvertedPlane, span: Span, base: int, at: int, stride: int, item: int
) -> npt.NDArray[np.uint64]:
    size = group.view.page_size
    end = span.first_token + span.tokens
    origin = span.first_token // size
    parts = []
    index = 0
    while index < len(span.pages):
        begin = (origin + index) * size
        first, last = max(span.first_token, begin) - begin, min(end, begin + size) - begin
        # Whole pages have their runs in common.
        whole = first == 0 and last == size
        count = (end // size - origin - index) if whole else 1
        offsets, run = box_runs(
            plane.order, plane.dim, item, span.first_head, span.heads, first, last - first
        )
        chosen = np.asarray(span.pages[index : index + count], dtype=np.int64)
        device = base + plane.order.offset + chosen[:, None] * plane.page_stride + offsets[None, :]
        host = at + np.arange(index, index + count, dtype=np.int64)[:, None] * stride + offsets[None, :]
        pairs = np.empty((device.size, 3), dtype=np.uint64)
        pairs[:, 0], pairs[:, 1], pairs[:, 2] = device.reshape(-1), host.reshape(-1), run
        parts.append(pairs)
        index += count
    return np.concatenate(parts)


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
