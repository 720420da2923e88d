# SPDX-License-Identifier: Apache-2.0
"""Pages of a KV cache group to canonical wire bytes and back, on this CPU.

``GroupConverter`` is the plan of one group: what lies where, and how each plane stands
on the wire. ``Span`` says which layers, heads and tokens; both sides of a transfer
compute a span's wire bytes and their order from these numbers alone (docs/format.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sage_kv_connector import _data_plane
from sage_kv_connector.contract.element_order import ElementOrder
from sage_kv_connector.format.wire_format import WireFormat


class Span(NamedTuple):
    """A box of KV: layers of the group, heads of the worker, tokens of the request.

    ``pages[i]`` is the page id that holds page ``first_token // page_size + i`` of the request.
    """

    first_layer: int
    layers: int
    first_head: int
    heads: int
    first_token: int
    tokens: int
    pages: Sequence[int]


class ConvertedPlane(NamedTuple):
    """One plane over all layers of a group; strides in bytes.

    ``bases`` are the addresses of page 0 by layer; ``memory_scales`` the engine's scales of
    fp8 caches (value = code x scale); ``wire_scales`` those that a "tensor" format uses.
    """

    order: ElementOrder
    page_stride: int
    dim: int
    format: WireFormat
    bases: Sequence[int]
    memory_scales: Sequence[float]
    wire_scales: Sequence[float]


def tile_kernels() -> list[str]:
    """Instruction sets that this machine can run, the fastest first."""
    return list(_data_plane.tile_kernels())


class GroupConverter:
    """Encodes spans of one group's pages to wire bytes and decodes them into pages.

    ``heads`` are those of this worker. Construction and every call raise ValueError naming
    the argument, its value and what is allowed.
    """

    def __init__(
        self,
        dtype: str,
        page_size: int,
        pages: int,
        heads: int,
        planes: Sequence[ConvertedPlane],
        kernels: str = "",
    ) -> None:
        fields = []
        for plane in planes:
            fmt, order = plane.format, plane.order
            if fmt.rotate:
                raise ValueError("rotate is True, which the CPU kernels don't do")
            fields.append(
                (
                    order.token,
                    order.channel,
                    order.head_stride,
                    plane.page_stride,
                    plane.dim,
                    (fmt.dtype, fmt.granularity, fmt.group_tokens, fmt.zero_point),
                    [base + order.offset for base in plane.bases],
                    list(plane.memory_scales),
                    list(plane.wire_scales),
                )
            )
        self.native = _data_plane.paged_converter(dtype, page_size, pages, heads, fields, kernels)

    @property
    def kernels(self) -> str:
        return str(self.native.kernels)

    def wire_bytes(self, span: Span) -> int:
        return int(self.native.wire_bytes(tuple(span)))

    def encode(self, span: Span, wire: int, wire_length: int) -> None:
        """Pages to ``wire`` (an address), without the GIL."""
        self.native.encode(tuple(span), wire, wire_length)

    def decode(self, span: Span, wire: int, wire_length: int) -> None:
        """``wire`` to pages, without the GIL."""
        self.native.decode(tuple(span), wire, wire_length)
