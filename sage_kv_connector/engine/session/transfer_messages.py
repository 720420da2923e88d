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
#: A week.
MAX_TIMEOUT_MS = 604_800_000
#: Who is busy names at most this time to come back.
MAX_AGAIN_MS = 600_000
#: A converted part has at most this many bytes.
MAX_PART_BYTES = 16 << 20
#: Groups that parts are of, and runs of layers of one.
MAX_PART_GROUPS, MAX_LAYER_RUNS = 64, 1024
#: (first, count) of neighbouring places in a request, ascending.
Runs = tuple[tuple[int, int], ...]


class PageRuns(msgspec.Struct, array_like=True, frozen=True):
    """Pages of one kv group by their place in the request: (first, count) runs, ascending."""

    group: int
    runs: Runs

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
    ``replaces``: the generation of the same consumer's subscription over a session that was lost, or 0.
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
    replaces: int = 0

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


class PartGroup(msgspec.Struct, array_like=True, frozen=True):
    """Of one kv group: what is wanted of it. The parts are cut from this on both sides (``part_plan``).

    ``group`` is the producer's, ``runs`` are (first, count) of its layers in the order of the wire, tokens count from
    the request's first. ``formats``: one for each canonical plane; none of a group without such, whose pages go whole.
    """

    group: int
    runs: Runs
    first_token: int
    tokens: int
    formats: tuple[WireFormat, ...]

    def check(self) -> None:
        check_number("group", self.group, 0, 1 << 16)
        check_length("runs", self.runs, 1, MAX_LAYER_RUNS, "entries")
        for first, count in self.runs:
            check_number("first layer of a run", first, 0, 1 << 16)
            check_number("layers of a run", count, 1, 1 << 16)
        check_number("first_token", self.first_token, 0, 1 << 40)
        check_number("tokens", self.tokens, 1, 1 << 32)
        check_length("formats", self.formats, 0, 16, "entries")


class SubscribeParts(msgspec.Struct, tag="subscribe_parts", array_like=True, frozen=True):
    """Consumer → producer: convert this box of KV to these formats and stream it, part after part.

    Heads count over the whole model. A part has at most ``part_bytes``, or one tile of each head of a layer;
    ``nbytes``: of all of them. A ``grant`` names the window. The rest is as for ``subscribe``.

    ``window``: where it is not empty the consumer converts by itself, from the producer's pages where they lie. They
    are posted into this window as those of ``subscribe``: the pages of each group that hold its tokens, all layers;
    ``nbytes``: of these pages.
    """

    transfer_id: str
    generation: int
    nbytes: int
    groups: tuple[PartGroup, ...]
    first_head: int
    heads: int
    part_bytes: int
    checksum: bool
    finished: bool
    timeout_ms: int
    consumers: int = 1
    prompt: PromptDigest = UNBOUND
    replaces: int = 0
    window: bytes = b""

    def check(self) -> None:
        _check_subscription(self)
        check_length("groups", self.groups, 1, MAX_PART_GROUPS, "entries")
        behind = -1
        for group in self.groups:
            group.check()
            if group.group <= behind:
                raise ProtocolError(f"groups name {group.group} behind {behind}, must ascend")
            behind = group.group
        check_number("first_head", self.first_head, 0, 1 << 16)
        check_number("heads", self.heads, 1, 1 << 16)
        check_number("part_bytes", self.part_bytes, 1, MAX_PART_BYTES)


class PartsReady(msgspec.Struct, tag="parts_ready", array_like=True, frozen=True):
    """Producer → consumer: there is something to send for this subscription, grant it room."""

    generation: int

    def check(self) -> None:
        check_number("generation", self.generation, 1, MAX_UINT64)


class Grant(msgspec.Struct, tag="grant", array_like=True, frozen=True):
    """Consumer → producer: the first ``parts`` parts of this subscription may be sent into ``window``."""

    generation: int
    parts: int
    window: bytes

    def check(self) -> None:
        check_number("generation", self.generation, 1, MAX_UINT64)
        check_number("parts", self.parts, 1, 1 << 32)


def _check_subscription(message: Subscribe | SubscribeParts) -> None:
    check_transfer_id(message.transfer_id)
    check_number("generation", message.generation, 1, MAX_UINT64)
    check_number("nbytes", message.nbytes, 1, MAX_UINT64)
    check_number("timeout_ms", message.timeout_ms, 1, MAX_TIMEOUT_MS)
    check_number("consumers", message.consumers, 1, MAX_CONSUMERS)
    check_number("replaces", message.replaces, 0, MAX_UINT64)
    _check_prompt(message.prompt)


def _check_prompt(prompt: PromptDigest) -> None:
    check_number("prompt.tokens", prompt.tokens, 0, 1 << 40)
    if len(prompt.digest) not in (0, DIGEST_BYTES):
        raise ProtocolError(f"prompt.digest has {len(prompt.digest)} bytes, allowed: 0 or {DIGEST_BYTES}")


class Failed(msgspec.Struct, tag="failed", array_like=True, frozen=True):
    """Producer → consumer: this subscription won't complete. ``again_ms``: it may after this time, 0: it won't."""

    transfer_id: str
    generation: int
    code: str
    detail: str
    again_ms: int = 0

    def check(self) -> None:
        check_transfer_id(self.transfer_id)
        check_number("again_ms", self.again_ms, 0, MAX_AGAIN_MS)


class Cancel(msgspec.Struct, tag="cancel", array_like=True, frozen=True):
    """Consumer → producer: stop this subscription; its window is closed."""

    transfer_id: str
    generation: int

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
