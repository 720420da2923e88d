# SPDX-License-Identifier: Apache-2.0
"""A transfer on offer: its memory, who consumes it, and when everybody is served.

An offer has *consumers*; each is served by one stream. What a consumer did not get and why is kept as the
offer's trouble. State only: the producer acts on it. Control thread only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from sage_kv_connector.backends.base import Event, Status
from sage_kv_connector.contract.failure import Code, Failure, Reason, reason_of_peer
from sage_kv_connector.contract.failure_kinds import FAILURE_KINDS
from sage_kv_connector.contract.plan import Outcome, TransferStats
from sage_kv_connector.contract.prompt import Prompt, PromptDigest
from sage_kv_connector.contract.trace import TraceContext
from sage_kv_connector.engine.control.timers import Timer
from sage_kv_connector.engine.conversion.wire_plan import SAME, wire_dtype_of
from sage_kv_connector.engine.pages.paged import refusal_code
from sage_kv_connector.engine.pages.source import Cursor, Source
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.session.session import Session, owner_of
from sage_kv_connector.engine.transfer.part_sender import PartSender
from sage_kv_connector.telemetry.recording.snapshot import TransferRecord

#: Called once when an offer's memory is free again; the outcome says whether it was delivered.
OnReleased = Callable[[Outcome], None]


class Stream:
    """One subscription being served."""

    def __init__(self, session: Session, request: m.Subscribe | m.SubscribeParts) -> None:
        self.session = session
        self.owner = owner_of(session)
        self.request = request
        self.window = request.window  #: empty until a grant names it
        self.cursor: Cursor | None = None
        self.part: PartSender | None = None
        self.by_lanes = False  #: one post sends all of it, each page once it is final
        self.posted = False
        self.posts: set[int] = set()
        self.came_at = time.monotonic()
        self.begun_at = 0.0  #: when it met its offer
        self.first_at = self.sent_at = 0.0  #: its first chunk was cut, its last was taken
        self.timer: Timer | None = None
        self.waits_s = 0.0  #: what the timer was set to, before there is an offer

    @property
    def transfer_id(self) -> str:
        return self.request.transfer_id

    @property
    def generation(self) -> int:
        return self.request.generation

    @property
    def delivered(self) -> bool:
        if self.posts or not self.posted:
            return False
        return self.by_lanes or (self.cursor is not None and self.cursor.exhausted)

    @property
    def wire_dtype(self) -> str:
        if isinstance(self.request, m.Subscribe):
            return SAME
        return wire_dtype_of(group.formats for group in self.request.groups)

    @property
    def refusal(self) -> Reason | None:
        """Why nothing can go to this consumer in the way it asks."""
        verdict = self.session.verdict
        if verdict.refusal or not verdict.must_convert:
            return verdict.refusal
        if isinstance(self.request, m.Subscribe) and self.request.selection:
            return Reason(Code.SCHEMA, f"pages can't go as they are: {verdict.must_convert}")
        return None

    def moved(self, sent: Event) -> None:
        """One of its posts ended well."""
        self.first_at = self.first_at or sent.began_ns / 1e9 or self.begun_at
        self.sent_at = sent.time_ns / 1e9

    def trouble(self, sent: Event) -> Reason | None:
        """What a SENT event says went wrong."""
        if sent.status == Status.OK:
            return None
        if sent.status in (Status.BEYOND_END, Status.OUT_OF_BOUNDS) and self.by_lanes:
            return Reason(refusal_code(sent.status), sent.why)
        code = Code.CONVERSION if sent.status == Status.NOT_CONVERTED else Code.SEND_FAILED
        return Reason(code, sent.why)

    def grant(self, message: m.Grant) -> None:
        """The consumer of a converting one has a window, and room for so many parts."""
        if self.part is not None and not self.window:
            self.window = message.window
            self.part.granted(message.parts)

    def fail(self, why: Reason, again_s: float = 0.0) -> None:
        """Tell the consumer that it won't complete, or may after ``again_s``."""
        detail, again_ms = why.detail[: m.MAX_DETAIL], int(again_s * 1000)
        self.session.send(m.Failed(self.transfer_id, self.generation, why.code, detail, again_ms))

    def release(self, why: str) -> m.Release:
        """What its consumer would say, had it the time to."""
        return m.Release(self.transfer_id, self.request.consumers, why[: m.MAX_DETAIL], self.request.prompt)

    def stop(self) -> None:
        """Revoke what is in flight, give back what it holds."""
        for post in self.posts:
            self.session.backend.cancel(post)
        if self.part is not None:
            self.part.close()
        if self.timer is not None:
            self.timer.cancel()
        self.session.drop()


class OfferTerms(NamedTuple):
    """Who may have an offer.

    ``consumers``: so many are to be served before it is released. ``only_for``: no engine but this one may subscribe
    ("" = any that knows the secret). ``finished``: nothing more will become ready. ``family``: an id that it goes by
    as well, with others. ``prompt``: whose KV it is; None for what is no prompt's, or is not known. ``exact``: it
    can't be had for fewer tokens than these. ``trace``: the context that its request brought.
    """

    consumers: int = 1
    only_for: str = ""
    finished: bool = False
    family: str = ""
    prompt: Prompt | None = None
    exact: bool = False
    trace: TraceContext | None = None


NO_TERMS = OfferTerms()


class Offer:
    """One transfer id and its memory."""

    def __init__(self, transfer_id: str, source: Source, on_released: OnReleased, terms: OfferTerms) -> None:
        self.transfer_id = transfer_id
        self.source = source
        self.on_released: OnReleased | None = on_released
        self.expected = terms.consumers
        self.only_for = terms.only_for
        self.prompt = terms.prompt
        self.exact = terms.exact
        self.family = terms.family
        self.names = tuple({transfer_id, terms.family} - {""})
        self.trace = terms.trace
        self.offered_at = time.monotonic()
        self.finished_at = 0.0
        self.stats: TransferStats | None = None
        self.stages: tuple[tuple[str, float], ...] = ()
        self.streams: dict[int, Stream] = {}
        self.served: set[int] = set()
        self.away: list[int] = []  #: generations whose session was lost; some came back
        self.declined = 0
        self.trouble: Reason | None = None  #: why a consumer did not get what it needed
        self.peer = ""  #: who consumed it last
        self.finished = False
        self.lease: Timer | None = None

    @property
    def done(self) -> bool:
        """Nothing is to come, and everybody who was expected was served or declined."""
        everybody = len(self.served) + self.declined >= self.expected
        return self.finished and everybody and not self.streams

    @property
    def must_pump(self) -> bool:
        """Whether what becomes ready must be posted to one of its streams."""
        return any(not stream.by_lanes for stream in list(self.streams.values()))

    def has_room(self, consumers: int) -> bool:
        """Whether it expects one more of ``consumers`` consumers."""
        known = len(self.served) + len(self.streams) + self.declined
        return known < max(self.expected, consumers)

    def differs(self, prompt: PromptDigest) -> Reason | None:
        """Why this is not the KV that a consumer means; None if it is, or if that can't be told."""
        ours = self.prompt
        if ours is None or not prompt.tokens:
            return None
        if prompt.tokens > ours.tokens:
            return Reason(Code.TOKENS, f"prefill has {ours.tokens} tokens, {prompt.tokens} asked for")
        if self.exact and prompt.tokens < ours.tokens:
            return Reason(
                Code.TOKENS, f"a state after {ours.tokens} tokens, one after {prompt.tokens} asked for"
            )
        if prompt.digest and ours.digest(prompt.tokens) != prompt:
            return Reason(Code.PROMPT, f"its first {prompt.tokens} tokens, salt, adapter or items differ")
        return None

    def is_serving(self, stream: Stream) -> bool:
        return self.streams.get(stream.generation) is stream

    def decline(self, release: m.Release) -> None:
        """One of its consumers wants nothing (any more)."""
        self.declined += 1
        self.expected = max(self.expected, release.consumers)
        if release.detail:
            self.trouble = self.trouble or reason_of_peer(Code.DECLINED, release.detail)

    def keep_stats(self, stream: Stream) -> None:
        """A consumer has all that it wanted."""
        plan, converted = stream.session.plan, isinstance(stream.request, m.SubscribeParts)
        assert plan is not None
        self.stats = TransferStats(
            transfer_id=self.transfer_id,
            nbytes=stream.request.nbytes,
            wait_s=max(0.0, stream.begun_at - self.offered_at),
            transfer_s=time.monotonic() - stream.begun_at,
            backend=plan.backend,
            mode=stream.session.mode(converted=converted, read=stream.part is None),
            checksum=plan.checksum,
            wire_dtype=stream.wire_dtype,
            peer=stream.session.label,
            security=plan.security,
        )

    def told(self, record: TransferRecord) -> None:
        """What became of one of its consumers, or of itself where there was none."""
        if record.code == "ok" or self.stats is None:
            self.stages = record.stages

    def outcome(self, why: Reason | None) -> Outcome:
        """Of one that is released for this reason; bytes that a consumer got count more."""
        if self.stats is not None or why is None:
            return Outcome(self.transfer_id, self.stats, stages=self.stages)
        kind = FAILURE_KINDS[why.code]
        failure = Failure(why.code, kind.stage, why.detail, self.peer, 0, kind.aborted)
        return Outcome(self.transfer_id, None, failure, self.stages)
