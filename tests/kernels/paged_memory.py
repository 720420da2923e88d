# SPDX-License-Identifier: Apache-2.0
"""Paged KV in NumPy with any order of elements, and what the reference makes of it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sage_kv_connector.contract.element_order import ElementOrder
from sage_kv_connector.format.converter import ConvertedPlane, GroupConverter, Span
from sage_kv_connector.format.reference import RAW, decode_tile, encode_tile, from_float, to_float
from sage_kv_connector.format.wire_format import WireFormat, tile_tokens

U8 = npt.NDArray[np.uint8]


class PagedMemory:
    """``layers`` arrays of ``pages`` pages, each of ``page_bytes`` bytes, and the order of one plane in them."""

    def __init__(
        self,
        dtype: str,
        order: ElementOrder,
        *,
        heads: int,
        page_size: int,
        dim: int,
        pages: int,
        page_bytes: int,
        layers: int,
    ) -> None:
        self.dtype, self.order = dtype, order
        self.heads, self.page_size, self.dim = heads, page_size, dim
        self.pages, self.page_bytes = pages, page_bytes
        self.data = np.zeros((layers, pages, page_bytes), np.uint8)

    def plane(self, fmt: WireFormat, memory_scale: float = 1.0, wire_scale: float = 1.0) -> ConvertedPlane:
        layers = len(self.data)
        bases = [int(self.data[layer].ctypes.data) for layer in range(layers)]
        return ConvertedPlane(
            self.order, self.page_bytes, self.dim, fmt, bases, [memory_scale] * layers, [wire_scale] * layers
        )

    def converter(
        self, fmt: WireFormat, memory_scale: float = 1.0, wire_scale: float = 1.0, kernels: str = ""
    ) -> GroupConverter:
        plane = self.plane(fmt, memory_scale, wire_scale)
        return GroupConverter(self.dtype, self.page_size, self.pages, self.heads, [plane], kernels)

    def _offsets(self, head: int, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        item = np.dtype(RAW[self.dtype]).itemsize
        channels = np.arange(self.dim)
        t_tile, t_inner, t_outer = self.order.token
        c_tile, c_inner, c_outer = self.order.channel
        token = (tokens % t_tile) * t_inner + (tokens // t_tile) * t_outer
        channel = (channels % c_tile) * c_inner + (channels // c_tile) * c_outer
        start = self.order.offset + head * self.order.head_stride
        first = start + token[:, None] + channel[None, :]
        return first[:, :, None] + np.arange(item)

    def elements(self, span: Span, layer: int, head: int) -> npt.NDArray[np.generic]:
        """Raw bits of a span's tokens of one head, shape (tokens, dim)."""
        rows = []
        for token in range(span.first_token, span.first_token + span.tokens):
            page = span.pages[token // self.page_size - span.first_token // self.page_size]
            at = self._offsets(head, np.array([token % self.page_size]))
            rows.append(self.data[layer, page][at[0]].reshape(-1).view(RAW[self.dtype]))
        return np.stack(rows)

    def fill(self, span: Span, layer: int, head: int, raw: npt.NDArray[np.generic]) -> None:
        item = np.dtype(RAW[self.dtype]).itemsize
        for row, token in enumerate(range(span.first_token, span.first_token + span.tokens)):
            page = span.pages[token // self.page_size - span.first_token // self.page_size]
            at = self._offsets(head, np.array([token % self.page_size]))
            self.data[layer, page][at[0]] = np.ascontiguousarray(raw[row]).view(np.uint8).reshape(-1, item)


def reference_wire(
    memory: PagedMemory, span: Span, fmt: WireFormat, memory_scale: float, wire_scale: float
) -> U8:
    """What a span's wire bytes must be."""
    parts = []
    for layer in range(span.first_layer, span.first_layer + span.layers):
        heads = range(span.first_head, span.first_head + span.heads)
        raw = {head: memory.elements(span, layer, head) for head in heads}
        at = 0
        for count in tile_tokens(span.first_token, span.tokens, fmt.group_tokens):
            for head in heads:
                values = to_float(raw[head][at : at + count], memory.dtype) * np.float32(memory_scale)
                parts.append(encode_tile(values, fmt, wire_scale))
            at += count
    return np.concatenate(parts)


def reference_elements(
    wire: U8, memory: PagedMemory, span: Span, fmt: WireFormat, memory_scale: float, wire_scale: float
) -> dict[tuple[int, int], npt.NDArray[np.generic]]:
    """(layer, head) → the raw bits that decoding ``wire`` must leave there."""
    found: dict[tuple[int, int], list[npt.NDArray[np.generic]]] = {}
    at = 0
    for layer in range(span.first_layer, span.first_layer + span.layers):
        for count in tile_tokens(span.first_token, span.tokens, fmt.group_tokens):
            for head in range(span.first_head, span.first_head + span.heads):
                size = fmt.tile_bytes(count, memory.dim)
                values = decode_tile(wire[at : at + size], fmt, count, memory.dim, wire_scale)
                scaled = values * (np.float32(1) / np.float32(memory_scale))
                found.setdefault((layer, head), []).append(from_float(scaled, memory.dtype))
                at += size
    return {key: np.concatenate(parts) for key, parts in found.items()}
