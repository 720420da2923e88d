# SPDX-License-Identifier: Apache-2.0
"""Where the elements of a page lie: the orders that engines keep K, V and latents in.

Canonical coordinates of an element are (head, token, channel). ``ElementOrder`` maps
them to a byte offset in a page by a two-level stride for token and channel, which
covers plain strided tensors and the packed blocks of vLLM's CPU kernels.
"""

from __future__ import annotations

from typing import NamedTuple

Strides = tuple[int, int, int]


class ElementOrder(NamedTuple):
    """Byte offset of (head, token, channel) in a page::

    offset + head * head_stride
    + (token % tile) * inner + (token // tile) * outer     of ``token`` = (tile, inner, outer)
    + the same of ``channel``
    """

    offset: int
    head_stride: int
    token: Strides
    channel: Strides


def strided(offset: int, head: int, token: int, channel: int) -> ElementOrder:
    """Plain strides in bytes."""
    return ElementOrder(offset, head, (1 << 20, token, token << 20), (1 << 20, channel, channel << 20))


#: CPU instruction sets of vLLM whose packing is known, by the dtypes (bytes an element) it is known for.
#: Found by writing numbered elements through vLLM 0.32's ``cpu_attn_reshape_and_cache`` and reading them back.
_VEC = ("vec", "vec16", "rvv", "vxe", "vsx")


def packed_cpu_planes(
    packing: str, item: int, page_size: int, dim: int
) -> tuple[ElementOrder, ElementOrder] | None:
    """K and V of one vLLM CPU block, which holds for each head first all K, then all V.

    ``packing`` is the schema's tag (``cpu-vec``, ``cpu-amx`` …), ``item`` the bytes of an
    element. None for a packing that is not known; such caches only move between equals.
    """
    isa = packing.removeprefix("cpu-")
    plane = page_size * dim * item
    if isa in _VEC or (isa == "neon" and item != 2):
        key = strided(0, 2 * plane, item, page_size * item)  # a column a channel
        value = strided(plane, 2 * plane, dim * item, item)
        return key, value
    if isa == "amx" and page_size % 16 == 0 and dim % 16 == 0:
        # Tiles of 16 columns; 1- and 2-byte elements are paired along the axis that is summed over.
        pair = 2 if item <= 2 else 1
        column = pair * item
        key = ElementOrder(0, 2 * plane, (16, column, 16 * dim * item), (pair, item, 16 * column))
        value = ElementOrder(plane, 2 * plane, (pair, item, 16 * column), (16, column, 16 * page_size * item))
        return key, value
    return None
