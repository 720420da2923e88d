# SPDX-License-Identifier: Apache-2.0
"""The wire formats of docs/format.md: which they are, and how many bytes a tile takes.

A *tile* is one head of one token group of one plane of one layer: ``tokens × dim``
elements, at most ``group_tokens`` tokens. It is written as up to three sections, each
padded with zero bytes to a multiple of 16: scales (bf16), zero points (bf16), codes.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from sage_kv_connector.contract.dtypes import CAST_DTYPES as CAST_DTYPES
from sage_kv_connector.contract.dtypes import CODE_MAX as CODE_MAX
from sage_kv_connector.contract.dtypes import CONVERTIBLE_DTYPES as CONVERTIBLE_DTYPES
from sage_kv_connector.contract.dtypes import DTYPE_BITS as DTYPE_BITS
from sage_kv_connector.contract.dtypes import ENGINE_SCALED_DTYPES as ENGINE_SCALED_DTYPES
from sage_kv_connector.contract.dtypes import SCALED_DTYPES as SCALED_DTYPES
from sage_kv_connector.contract.dtypes import WIRE_DTYPES as WIRE_DTYPES
from sage_kv_connector.contract.dtypes import dtype as dtype

#: What one scale covers inside a tile.
Granularity = Literal["none", "tensor", "channel", "token", "head"]

SECTION_ALIGNMENT = 16
MAX_GROUP_TOKENS = 1024
MAX_HEAD_DIM = 4096


class WireFormat(msgspec.Struct, frozen=True):
    """How the elements of one plane stand on the wire.

    ``granularity``: "none" casts; "tensor" uses the engine's own scale of the layer,
    which both sides know, so none is sent; "channel" has one scale for each of the
    ``dim`` channels over the tokens of a tile, "token" one for each token, "head" one
    for the tile. ``zero_point`` (int4 only): codes 0 to 15 count from a minimum that is
    sent beside each scale; else codes are -7 to 7. ``rotate`` (int4 only): channels are
    Hadamard-rotated first, ``dim`` must be a power of two.

    Construction raises ValueError naming the field, its value and what is allowed.
    """

    dtype: str
    granularity: Granularity = "none"
    group_tokens: int = 64
    zero_point: bool = False
    rotate: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in WIRE_DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, allowed: {', '.join(WIRE_DTYPES)}")
        row = dtype(self.dtype)
        allowed: tuple[str, ...] = ("none", "tensor", "channel", "token", "head")
        if self.dtype in CAST_DTYPES:
            allowed = ("none",)
        elif row.kind == "integer":  # codes mean nothing without a scale that is sent
            allowed = ("channel", "token", "head")
        if self.granularity not in allowed:
            raise ValueError(
                f"granularity of {self.dtype} is {self.granularity!r}, allowed: {', '.join(allowed)}"
            )
        if not 1 <= self.group_tokens <= MAX_GROUP_TOKENS:
            raise ValueError(f"group_tokens is {self.group_tokens}, allowed: 1 to {MAX_GROUP_TOKENS}")
        if (self.zero_point or self.rotate) and not row.zero_point:
            with_them = ", ".join(name for name in WIRE_DTYPES if dtype(name).zero_point)
            raise ValueError(f"zero_point and rotate are for {with_them}, not {self.dtype}")

    @property
    def sends_scales(self) -> bool:
        return self.granularity in ("channel", "token", "head")

    def scale_count(self, tokens: int, dim: int) -> int:
        """Scales in a tile."""
        return {"channel": dim, "token": tokens, "head": 1}.get(self.granularity, 0)

    def sections(self, tokens: int, dim: int) -> tuple[int, int, int]:
        """Padded bytes of a tile's scales, zero points and codes."""
        scales = _padded(2 * self.scale_count(tokens, dim))
        codes = _padded((tokens * dim * DTYPE_BITS[self.dtype] + 7) // 8)
        return scales, scales if self.zero_point else 0, codes

    def tile_bytes(self, tokens: int, dim: int) -> int:
        return sum(self.sections(tokens, dim))

    def span_bytes(self, first_token: int, tokens: int, dim: int) -> int:
        """Bytes of one head's tiles for tokens ``[first_token, first_token + tokens)``.

        Tiles end at multiples of ``group_tokens`` of the token's place in the request.
        """
        group = self.group_tokens
        head = min(tokens, -first_token % group)
        full, tail = divmod(tokens - head, group)
        return (
            (self.tile_bytes(head, dim) if head else 0)
            + full * self.tile_bytes(group, dim)
            + (self.tile_bytes(tail, dim) if tail else 0)
        )


def tile_tokens(first_token: int, tokens: int, group_tokens: int) -> list[int]:
    """Tokens of each tile of ``[first_token, first_token + tokens)``, in order."""
    counts = []
    while tokens > 0:
        count = min(tokens, group_tokens - first_token % group_tokens)
        counts.append(count)
        first_token, tokens = first_token + count, tokens - count
    return counts


def _padded(nbytes: int) -> int:
    return -(-nbytes // SECTION_ALIGNMENT) * SECTION_ALIGNMENT
