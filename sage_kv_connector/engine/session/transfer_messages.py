# SPDX-License-Identifier: Apache-2.0
"""Messages about transfers, each with the bounds that a peer's must keep (``check``)."""

from __future__ import annotations

import msgspec

from sage_kv_connector.contract.prompt import DIGEST_BYTES, UNBOUND, PromptDigest
from sage_kv_connector.engine.session.bounds import (
    MAX_CONSUMERS,
    MAX_RENEWED,
    MAX_UINT64,
    ProtocolError,
    check_length,
    check_number,
    check_transfer_id,
)
from sage_kv_connector.format.wire_format import WireFormat

#: A subscription names at most this many page runs over all groups.
MAX_PAGE_RUNS = 1 << 16
#: A converted part has at most this many bytes and tokens.
MAX_PART_BYTES = 16 << 20
MAX_PART_TOKENS = 1 << 16
#: (first, count) of neighbouring places in a request, ascending.
Runs = tuple[tuple[int, int], ...]


class PageRuns(msgspec.Struct, array_like=True, frozen=True):
    """Pages of one kv group by their place in the request: (first, count) runs, ascending."""

    group: int
    runs: Runs

    @property
    def pages(self) -> int:
        return sum(count for _, count in self.runs)

    def check(self) -> None:
        end = 0
        for first, count in self.runs:
            if first < end or count <= 0 or first + count > 1 << 40:
                raise ProtocolError(
                    f"selection of group {self.group}: run ({first}, {count}) is empty, out of order or too far"
                )
            end = first + count


class Subscribe(msgspec.Struct, tag="subscribe", array_like=True, frozen=True):
    """Consumer → producer: stream these pages of this transfer into my window.

    An empty ``selection`` means everything that the producer offers under that id.
    ``finished``: the consumer knows that prefill is over, so an unknown id is an error at once.
    ``consumers``: so many read this transfer from this producer. ``prompt``: whose KV it must be.
    """

    transfer_id: str
    generation: int
    window: bytes
    nbytes: int
    selection: tuple[PageRuns, ...]
    checksum: bool
    finished: bool
    timeout_ms: int
    consumers: int = 1
    prompt: PromptDigest = UNBOUND

    @property
    def consumer(self) -> int:
        """What all streams of one consumer have in common: of a subscription there is one."""
        return self.generation

    def check(self) -> None:
        _check_subscription(self)
        if sum(len(part.runs) for part in self.selection) > MAX_PAGE_RUNS:
            raise ProtocolError(f"selection has more than {MAX_PAGE_RUNS} page runs")
        seen: set[int] = set()
        for pages in self.selection:
            if pages.group < 0 or pages.group in seen:
                raise ProtocolError(f"selection names group {pages.group} twice or below 0")
            seen.add(pages.group)
            pages.check()


class SubscribePart(msgspec.Struct, tag="subscribe_part", array_like=True, frozen=True):
    """Consumer → producer: convert this box of KV to these formats and stream it into my window.

    ``group`` and the layers are the producer's, heads count over the whole model, tokens from the
    request's first. ``formats``: one for each canonical plane of the group. All parts of one
    consumer carry the same ``consumer``; ``last`` marks its last one. ``consumers``: so many
    read this transfer from this producer. ``prompt``: whose KV it must be.
    """

    transfer_id: str
    generation: int
    window: bytes
    nbytes: int
    group: int
    first_layer: int
    layers: int
    first_head: int
    heads: int
    first_token: int
    tokens: int
    formats: tuple[WireFormat, ...]
    consumer: int
    consumers: int
    last: bool
    checksum: bool
    finished: bool
    timeout_ms: int
    prompt: PromptDigest = UNBOUND

    def check(self) -> None:
        _check_subscription(self)
        check_number("group", self.group, 0, 1 << 16)
        check_number("first_layer", self.first_layer, 0, 1 << 16)
        check_number("layers", self.layers, 1, 1 << 16)
        check_number("first_head", self.first_head, 0, 1 << 16)
        check_number("heads", self.heads, 1, 1 << 16)
        check_number("first_token", self.first_token, 0, 1 << 40)
        check_number("tokens", self.tokens, 1, MAX_PART_TOKENS)
        check_number("nbytes", self.nbytes, 1, MAX_PART_BYTES)
        check_number("consumer", self.consumer, 1, MAX_UINT64)
        check_length("formats", self.formats, 1, 16, "entries")


def _check_subscription(message: Subscribe | SubscribePart) -> None:
    check_transfer_id(message.transfer_id)
    check_number("generation", message.generation, 1, MAX_UINT64)
    if message.nbytes <= 0 or message.timeout_ms <= 0:
        raise ProtocolError(
            f"nbytes is {message.nbytes} and timeout_ms {message.timeout_ms}, both must be positive"
        )
    check_number("consumers", message.consumers, 1, MAX_CONSUMERS)
    _check_prompt(message.prompt)


def _check_prompt(prompt: PromptDigest) -> None:
    check_number("prompt.tokens", prompt.tokens, 0, 1 << 40)
    if len(prompt.digest) not in (0, DIGEST_BYTES):
        raise ProtocolError(f"prompt.digest has {len(prompt.digest)} bytes, allowed: 0 or {DIGEST_BYTES}")


class Failed(msgspec.Struct, tag="failed", array_like=True, frozen=True):
    """Producer → consumer: this subscription won't complete."""

    transfer_id: str
    generation: int
    code: str
    detail: str

    def check(self) -> None:
        check_transfer_id(self.transfer_id)


class Cancel(msgspec.Struct, tag="cancel", array_like=True, frozen=True):
    """Consumer → producer: stop this subscription, or all parts of this consumer; its windows are closed."""

    transfer_id: str
    consumer: int

    def check(self) -> None:
        check_transfer_id(self.transfer_id)


class Release(msgspec.Struct, tag="release", array_like=True, frozen=True):
    """Consumer → producer: this consumer, one of ``consumers``, wants nothing of this transfer (any more).

    ``detail``: why it gave up what it needed; empty if it never needed it. ``prompt``: of which of the id's prompts.
    """

    transfer_id: str
    consumers: int = 1
    detail: str = ""
    prompt: PromptDigest = UNBOUND

    def check(self) -> None:
        check_transfer_id(self.transfer_id)
        _check_prompt(self.prompt)


class Renew(msgspec.Struct, tag="renew", array_like=True, frozen=True):
    """Consumer → producer: keep these transfers' pages for another lease."""

    transfer_ids: tuple[str, ...]

    def check(self) -> None:
        check_number("number of transfer_ids", len(self.transfer_ids), 0, MAX_RENEWED)
        for transfer_id in self.transfer_ids:
            check_transfer_id(transfer_id)
