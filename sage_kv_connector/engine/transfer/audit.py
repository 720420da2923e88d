# SPDX-License-Identifier: Apache-2.0
"""With ``audit_file``: digests of transferred KV, read back from each side's pool.

Where pages went as they are, the digest is that of their bytes. Where they were mapped, it
is that of their elements in canonical order, part by part, in this side's own dtype: equal on
both sides if nothing but the layout differs. ``parts`` names each part with its own digest, so that
sides of which several ranks share a transfer can be compared, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sage_kv_connector.contract.cache_view import KVCacheView
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.engine.conversion.wire_plan import group_converter
from sage_kv_connector.engine.pages.memory_digest import digest_segments
from sage_kv_connector.engine.pages.paged import PagedSource
from sage_kv_connector.engine.pages.source import Converted
from sage_kv_connector.engine.pages.target import PagesTarget
from sage_kv_connector.engine.transfer.subscription import Subscription
from sage_kv_connector.format.converter import Span
from sage_kv_connector.format.wire_format import WireFormat


class TransferAudit:
    """Appends one JSON line for each transfer that arrived, while the file exists."""

    def __init__(self, path: Path | None, rank: int) -> None:
        self._path = path
        self._rank = rank
        self._view: KVCacheView | None = None
        self._schema: KVCacheSchema | None = None

    def describe(self, view: KVCacheView, schema: KVCacheSchema) -> None:
        """What this side's cache looks like."""
        self._view, self._schema = view, schema

    def sent(self, source: PagedSource, outcome: Outcome) -> None:
        if not self._wanted(outcome):
            return
        if not source.converted:
            self._write("producer", outcome, digest_segments(source.served_segments(), hashlib.sha256()), [])
            return
        pages_of = source.token_pages().pages_of
        lines = [line for converted in source.converted for line in self._digest(converted, pages_of)]
        self._write("producer", outcome, *_of_all(lines))

    def received(self, handle: Subscription, outcome: Outcome) -> None:
        if not self._wanted(outcome):
            return
        fetch, target = handle.converting, handle.wanted.target
        if fetch is None or not isinstance(target, PagesTarget):
            self._write("consumer", outcome, digest_segments(target.segments(), hashlib.sha256()), [])
            return
        self._write("consumer", outcome, *_of_all(self._digest(fetch.converted, target.pages_of)))

    def _wanted(self, outcome: Outcome) -> bool:
        return self._path is not None and outcome.stats is not None and self._path.exists()

    def _digest(self, converted: Converted, pages_of: Callable[[int, int, int], list[int]]) -> list[str]:
        """A line for each part: what it is of, and the digest of its elements in this side's pages."""
        view, schema = self._view, self._schema
        assert view is not None and schema is not None
        lines = []
        first_head, heads = converted.first_head, converted.heads
        for index, first_layer, layers, first_token, tokens, _ in converted.parts.tolist():
            group = view.groups[index]
            formats = tuple(WireFormat(schema.dtype) for _ in group.canonical)
            converter = group_converter(group, index, formats, schema, schema, schema)
            head = first_head - schema.head_start
            pages = pages_of(index, first_token, tokens)
            span = Span(first_layer, layers, head, heads, first_token, tokens, pages)
            elements = np.zeros(converter.wire_bytes(span), np.uint8)
            converter.encode(span, elements.ctypes.data, len(elements))
            name = group.layers[first_layer].name
            digest = hashlib.sha256(elements.data).hexdigest()
            lines.append(f"{name} {layers} {first_head} {heads} {first_token} {digest}")
        return lines

    def _write(self, side: str, outcome: Outcome, digest: str, parts: list[str]) -> None:
        stats = outcome.stats
        assert stats is not None and self._path is not None
        record = {
            "side": side,
            "transfer_id": outcome.transfer_id,
            "rank": self._rank,
            "sha256": digest,
            "nbytes": stats.nbytes,
            "transfer_s": stats.transfer_s,
            "backend": stats.backend,
            "mode": stats.mode,
            "checksum": stats.checksum,
            "wire_dtype": stats.wire_dtype,
            "parts": parts,
        }
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def _of_all(lines: list[str]) -> tuple[str, list[str]]:
    lines = sorted(lines)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest(), lines
