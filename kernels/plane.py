# SPDX-License-Identifier: Apache-2.0
"""What a conversion kernel reads or writes in memory, and how it is launched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sage_kv_connector.format.converter import ConvertedPlane, Span
from sage_kv_connector.format.wire_format import CONVERTIBLE_DTYPES, ENGINE_SCALED_DTYPES, WireFormat


class Range(NamedTuple):
    """``length`` tokens (by their place in the request) or heads (by their place in the plane) from ``first``."""

    first: int
    length: int


class KernelLaunch(NamedTuple):
    """One launch of a loaded function: ``argument`` is the one struct that it takes."""

    function: int
    blocks: tuple[int, int]
    threads: int
    shared_bytes: int
    argument: bytes


class PagedGroup(NamedTuple):
    """Pages of a group in the memory of a device: ``pages`` of ``page_size`` tokens of ``heads``, in ``dtype``."""

    dtype: str
    page_size: int
    pages: int
    heads: int
    planes: Sequence[ConvertedPlane]

    def check(self, span: Span) -> None:
        """Raise ValueError naming what of a box these pages don't have."""
        layers, count = len(self.planes[0].bases), len(span.pages)
        wanted = (
            (span.first_token + span.tokens - 1) // self.page_size - span.first_token // self.page_size + 1
        )
        for name, first, length, most in (
            ("layers", span.first_layer, span.layers, layers),
            ("heads", span.first_head, span.heads, self.heads),
            ("tokens", span.first_token, span.tokens, 1 << 40),
        ):
            if first < 0 or length < 1 or first + length > most:
                raise ValueError(f"{name} are {first} + {length}, the pages have {most}")
        if count != wanted:
            raise ValueError(
                f"pages count is {count}, {span.tokens} tokens from {span.first_token} on have {wanted}"
            )
        if min(span.pages) < 0 or max(span.pages) >= self.pages:
            raise ValueError(
                f"a page id of {min(span.pages)} to {max(span.pages)} is not one of {self.pages} pages"
            )


class KVPlane(NamedTuple):
    """One plane of one layer.

    ``pages`` is a torch tensor of shape (pages, tokens of a page, heads, dim), in any
    strides: a view of the engine's own tensor. ``block_table[i]`` is the page of the
    request's tokens from ``i * tokens of a page`` on. A value of fp8 memory is
    code × ``memory_scale``; ``wire_scale`` is the scale of granularity "tensor".
    """

    pages: Any
    block_table: Sequence[int] | np.ndarray
    dtype: str
    memory_scale: float = 1.0
    wire_scale: float = 1.0

    def check(self, tokens: Range, heads: Range, fmt: WireFormat) -> None:
        """Raise ValueError naming what of a request this plane or the kernels can't serve."""
        pages, page_tokens, plane_heads, _ = self.pages.shape
        if fmt.rotate:
            raise ValueError("rotate is for measurements with the NumPy reference; no kernel has it")
        if self.dtype not in CONVERTIBLE_DTYPES:
            raise ValueError(f"memory dtype is {self.dtype!r}, allowed: {', '.join(CONVERTIBLE_DTYPES)}")
        if self.memory_scale != 1.0 and self.dtype not in ENGINE_SCALED_DTYPES:
            raise ValueError(f"memory_scale is {self.memory_scale}, but memory of {self.dtype} has none")
        for name, scale in (("memory_scale", self.memory_scale), ("wire_scale", self.wire_scale)):
            if not (math.isfinite(scale) and scale > 0):
                raise ValueError(f"{name} is {scale}, it must be finite and positive")
        if tokens.first < 0 or tokens.length < 1:
            raise ValueError(f"tokens are {tokens}, at least one from place 0 on is needed")
        if heads.first < 0 or heads.length < 1 or heads.first + heads.length > plane_heads:
            raise ValueError(f"heads are {heads}, the plane has {plane_heads}")
        wanted = -(-(tokens.first + tokens.length) // page_tokens)
        if wanted > len(self.block_table):
            raise ValueError(f"{tokens} need {wanted} pages, the block table has {len(self.block_table)}")
        used = np.asarray(self.block_table[tokens.first // page_tokens : wanted])
        if used.min() < 0 or used.max() >= pages:
            raise ValueError(f"a page id is outside of the plane's {pages} pages")

    def wire_bytes(self, tokens: Range, heads: Range, fmt: WireFormat) -> int:
        """Bytes that these tokens and heads take on the wire."""
        return heads.length * fmt.span_bytes(tokens.first, tokens.length, self.pages.shape[3])

    def check_wire(self, nbytes: int, tokens: Range, heads: Range, fmt: WireFormat) -> None:
        """Raise ValueError if a wire of ``nbytes`` is not as long as it must be."""
        expected = self.wire_bytes(tokens, heads, fmt)
        if nbytes != expected:
            raise ValueError(f"wire has {nbytes} bytes, {tokens} and {heads} take {expected}")
