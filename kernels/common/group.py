# SPDX-License-Identifier: Apache-2.0
"""Kernels over a group's pages, by addresses alone: one launch for a part of a transfer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sage_kv_connector.format.converter import ConvertedPlane, Span
from sage_kv_connector.format.wire_format import DTYPE_BITS
from sage_kv_connector.kernels.common.launch import (
    DATA_BYTES,
    MAX_PLANES,
    LayerPlane,
    PlaneLayout,
    launch_argument,
    launch_plane,
    tile_count,
)
from sage_kv_connector.kernels.plane import KernelLaunch, PagedGroup, Range

#: The function that does ``verb`` (encode, decode) between memory and wire of some dtypes; a handle of the device's.
FunctionOf = Callable[[str, str, str], int]
LAYER_PLANE_BYTES = 16
#: Addresses of page 0, by layer of a box and by plane of its group.
Bases = Sequence[Sequence[int]]
#: Page ids of a launch; the rest of its data is for layers.
MOST_IDS = 640


class _OfDtype(NamedTuple):
    """Planes that stand on the wire in one dtype: they go in a launch of their own."""

    wire_dtype: str
    planes: tuple[int, ...]


class GroupLaunches(ABC):
    """Of one group of pages. Raises ValueError for orders of elements and formats that the kernels don't have.

    A vendor's ``GroupKernels`` says what its kernels lack, and what shape a launch of them has.
    """

    @abstractmethod
    def check(self, dtype: str, layout: PlaneLayout) -> None:
        """Raise ValueError for a plane that these kernels don't have."""

    @abstractmethod
    def launch(
        self, function: int, planes: Sequence[PlaneLayout], tiles: Sequence[int], layers: int, argument: bytes
    ) -> KernelLaunch:
        """``tiles``: of each of the planes, in each layer."""

    def __init__(self, group: PagedGroup, function: FunctionOf) -> None:
        dtype, page_size, planes = group.dtype, group.page_size, group.planes
        if len(planes) > MAX_PLANES:
            raise ValueError(f"the group has {len(planes)} planes, a kernel takes {MAX_PLANES}")
        self._group, self._page_size, self._planes = group, page_size, tuple(planes)
        item = DTYPE_BITS[dtype] // 8
        self._layouts = [_layout(plane, item) for plane in planes]
        for layout in self._layouts:
            launch_plane(layout)
            self.check(dtype, layout)
        by_dtype: dict[str, list[int]] = {}
        for number, plane in enumerate(planes):
            by_dtype.setdefault(plane.format.dtype, []).append(number)
        self._launched = [_OfDtype(wire, tuple(numbers)) for wire, numbers in by_dtype.items()]
        self._tile_tokens = math.lcm(*(plane.format.group_tokens for plane in planes))
        if self._tile_tokens > page_size * MOST_IDS:
            raise ValueError(
                f"tiles of {self._tile_tokens} tokens have more pages of {page_size} than a launch takes ({MOST_IDS})"
            )
        self._functions = {
            (verb, each.wire_dtype): function(verb, dtype, each.wire_dtype)
            for each in self._launched
            for verb in ("encode", "decode")
        }

    def launches(
        self, verb: str, span: Span, wire: int, length: int, bases: Bases | None = None
    ) -> list[KernelLaunch]:
        """Convert the box between pages and ``length`` bytes of wire at an address of the device.

        ``bases``: where page 0 of each of the box's layers begins for this box, if not where the group's planes say.

        One launch, but for planes of several wire dtypes, and for more layers and pages than an argument has room for.
        Raises ValueError for a box that the pages don't have, and for another length than it takes.
        """
        self._group.check(span)
        sizes = self._sizes(span, span.tokens)
        starts, layer_bytes = np.cumsum([0, *sizes[:-1]]).tolist(), sum(sizes)
        if span.layers * layer_bytes != length:
            raise ValueError(f"wire has {length} bytes, the box takes {span.layers * layer_bytes}")
        found = []
        for tokens, pages in self._token_ranges(span):
            before = self._sizes(span, tokens.first - span.first_token)
            ids = np.asarray(span.pages[pages.start : pages.stop], dtype=np.int32)
            for each in self._launched:
                planes = [launch_plane(self._layouts[i], starts[i] + before[i]) for i in each.planes]
                layouts = [self._layouts[i] for i in each.planes]
                heads = Range(span.first_head, span.heads)
                tiles = [tile_count(tokens, heads, layout.fmt) for layout in layouts]
                most = (DATA_BYTES - ids.nbytes) // (LAYER_PLANE_BYTES * len(planes))
                for first in range(0, span.layers, most):
                    layers = range(
                        span.first_layer + first, span.first_layer + min(first + most, span.layers)
                    )
                    argument = launch_argument(
                        planes, self._layer_planes(each.planes, layers, span.first_layer, bases), ids,
                        wire=wire + first * layer_bytes, layer_bytes=layer_bytes, page_tokens=self._page_size,
                        first_token=tokens.first, tokens=tokens.length,
                        first_head=span.first_head, heads=span.heads,
                    )  # fmt: skip
                    function = self._functions[verb, each.wire_dtype]
                    found.append(self.launch(function, layouts, tiles, len(layers), bytes(argument)))
        return found

    def _sizes(self, span: Span, tokens: int) -> list[int]:
        """Wire bytes of the first ``tokens`` of a box in one layer, of each plane."""
        if tokens == 0:
            return [0] * len(self._planes)
        return [
            span.heads * plane.format.span_bytes(span.first_token, tokens, plane.dim)
            for plane in self._planes
        ]

    def _token_ranges(self, span: Span) -> Iterator[tuple[Range, range]]:
        """Ranges that end where tiles do, with so few pages that a launch has room for their ids, and these pages."""
        step = self._tile_tokens
        while step + self._tile_tokens <= self._page_size * MOST_IDS:
            step += self._tile_tokens
        first, end = span.first_token, span.first_token + span.tokens
        origin = first // self._page_size
        while first < end:
            stop = min(end, (first // step + 1) * step)
            pages = range(first // self._page_size - origin, -(-stop // self._page_size) - origin)
            yield Range(first, stop - first), pages
            first = stop

    def _layer_planes(
        self, planes: Sequence[int], layers: range, first_layer: int, bases: Bases | None
    ) -> list[LayerPlane]:
        found = []
        for layer in layers:
            for number in planes:
                plane = self._planes[number]
                base = plane.bases[layer] if bases is None else bases[layer - first_layer][number]
                found.append(
                    LayerPlane(
                        base + plane.order.offset, plane.memory_scales[layer], plane.wire_scales[layer]
                    )
                )
        return found


def check_rows(layout: PlaneLayout, most_channels: int | None = None) -> None:
    """Of kernels that move pieces of rows, channel beside channel. Raises ValueError for a plane without such rows.

    ``most_channels``: what they have room for, where they move whole rows.
    """
    stride, odd = layout.strides[2], layout.fmt.dtype == "int4" and layout.dim % 2
    if stride != 1:
        raise ValueError(f"channels {stride} elements apart: no kernel here has it")
    if odd:
        raise ValueError(f"int4 of an odd number of channels ({layout.dim}): no kernel here has it")
    if most_channels is not None and layout.dim > most_channels:
        raise ValueError(f"heads of {layout.dim} channels (at most {most_channels}): no kernel here has it")


def _layout(plane: ConvertedPlane, item: int) -> PlaneLayout:
    order = plane.order
    strides = (order.head_stride, order.token[1], order.channel[1])
    packed = any(outer != tile * inner for tile, inner, outer in (order.token, order.channel))
    if packed or any(stride % item for stride in strides):
        raise ValueError(
            f"order of elements: tokens {order.token}, channels {order.channel}, heads {order.head_stride}: "
            "kernels of a device take plain strides of whole elements"
        )
    head, token, dim = (stride // item for stride in strides)
    return PlaneLayout((head, token, dim), plane.page_stride, plane.dim, plane.format)
