# SPDX-License-Identifier: Apache-2.0
"""How a converting transfer is cut into parts, from what a consumer asks for alone: both sides come to the same ones.

Token ranges come first, groups inside, then layers: prefill computes chunk after chunk, layer after layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sage_kv_connector.engine.conversion.wire_plan import Formats

#: int64 (n, 6): group, first layer, layers, first token, tokens, bytes on the wire.
Parts = npt.NDArray[np.int64]

#: A part is ready when all its tokens are computed: no more than an engine's usual prefill chunk.
PART_TOKENS = 2048
#: A transfer has at most this many parts.
MAX_PARTS = 1 << 18


class Wanted(NamedTuple):
    """Of one group: ``runs`` (first, count) of layers here, ``dims`` channels of a head of each plane.

    Without ``formats`` its pages go as they are, and ``tokens`` are those of whole pages: ``page_tokens`` in
    ``page_bytes`` of each layer.
    """

    group: int
    runs: Sequence[tuple[int, int]]
    tokens: range
    formats: Formats
    dims: Sequence[int]
    page_tokens: int = 0
    page_bytes: int = 0


def plan_parts(groups: Sequence[Wanted], heads: int, part_bytes: int) -> Parts:
    """Each part has at most ``part_bytes``, or one tile of each head of one layer, or one page of one layer.

    Pages that go as they are come last: most are states, which are final when prefill ends. Raises ValueError for more
    than ``MAX_PARTS``.
    """
    wanted = [one for one in groups if one.formats]
    step = PART_TOKENS
    tile = max((fmt.group_tokens for one in wanted for fmt in one.formats), default=1)
    while step > tile and any(_layer_bytes(one, heads, 0, step) > part_bytes for one in wanted):
        step //= 2
    end = max((one.tokens.stop for one in wanted), default=0)
    start = min((one.tokens.start for one in wanted), default=0)
    layers = sum(count for one in wanted for _, count in one.runs)
    if ((end - start) // step + 2) * layers > MAX_PARTS:
        raise ValueError(
            f"tokens: {start} to {end} of {layers} layers are more than {MAX_PARTS} parts of {step} tokens"
        )
    rows: list[tuple[int, int, int, int, int, int]] = []
    # Ranges that lie alike in their tiles are alike: a peer may ask for many.
    known: dict[tuple[int, int, int], int] = {}
    alike = math.lcm(*(fmt.group_tokens for one in wanted for fmt in one.formats))
    for chunk in range(start - start % step, end, step):
        for one in wanted:
            first = max(chunk, one.tokens.start)
            count = min(chunk + step, one.tokens.stop) - first
            if count <= 0:
                continue
            key = (one.group, first % alike, count)
            each = known.get(key) or known.setdefault(key, _layer_bytes(one, heads, first, count))
            most = max(1, part_bytes // each)
            for run, in_run in one.runs:
                for at in range(0, in_run, most):
                    here = min(most, in_run - at)
                    rows.append((one.group, run + at, here, first, count, each * here))
    for one in groups:
        if not one.formats:
            rows += _whole_pages(one, part_bytes, MAX_PARTS - len(rows))
    return np.array(rows, dtype=np.int64).reshape(-1, 6)


def head_bytes(formats: Formats, dims: Iterable[int], first_token: int, tokens: int) -> int:
    """Wire bytes of one head of one layer, all planes."""
    return sum(fmt.span_bytes(first_token, tokens, dim) for fmt, dim in zip(formats, dims, strict=True))


def _whole_pages(one: Wanted, part_bytes: int, most_parts: int) -> list[tuple[int, int, int, int, int, int]]:
    """Rows of as many neighbouring pages, and then layers, as a part takes."""
    pages = len(one.tokens) // one.page_tokens
    at_once = min(pages, max(1, part_bytes // one.page_bytes))
    most = max(1, part_bytes // (at_once * one.page_bytes))
    if -(-pages // at_once) * sum(-(-count // most) for _, count in one.runs) > most_parts:
        raise ValueError(
            f"tokens: {pages} pages of {one.page_bytes} bytes are more than the {most_parts} parts that are left"
        )
    rows = []
    for page in range(0, pages, at_once):
        here = min(at_once, pages - page)
        first = one.tokens.start + page * one.page_tokens
        for run, in_run in one.runs:
            for at in range(0, in_run, most):
                layers = min(most, in_run - at)
                nbytes = layers * here * one.page_bytes
                rows.append((one.group, run + at, layers, first, here * one.page_tokens, nbytes))
    return rows


def _layer_bytes(one: Wanted, heads: int, first: int, count: int) -> int:
    return heads * head_bytes(one.formats, one.dims, first, count)
