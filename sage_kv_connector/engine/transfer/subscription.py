# SPDX-License-Identifier: Apache-2.0
"""One transfer on its way in: what is wanted, and how far it came."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from sage_kv_connector.backends.base import Event
from sage_kv_connector.contract.failure import Reason, Stage
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.plan import Outcome, TransferStats
from sage_kv_connector.contract.prompt import UNBOUND, PromptDigest
from sage_kv_connector.contract.trace import TraceContext
from sage_kv_connector.engine.control.timers import Timer
from sage_kv_connector.engine.pages.target import Target, open_window
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.session.session import Session
from sage_kv_connector.engine.transfer.windows import new_number

if TYPE_CHECKING:
    from sage_kv_connector.engine.transfer.page_read import PageRead
    from sage_kv_connector.engine.transfer.part_fetch import PartFetch


OnOutcome = Callable[[Outcome], None]


class Wanted(NamedTuple):
    """What to fetch, and where it goes.

    ``finished``: prefill is known to be over. ``consumers``: so many read this transfer from the same producer.
    ``prompt``: whose KV it must be. ``trace``: the context that the request brought; ``offer_trace``: the one that
    came with prefill's answer, if that is another.
    """

    transfer_id: str
    target: Target
    finished: bool
    deadline_s: float
    consumers: int = 1
    prompt: PromptDigest = UNBOUND
    trace: TraceContext | None = None
    offer_trace: TraceContext | None = None


class Subscription:
    """The handle of one that was asked for; ``on_outcome`` is None once it ended."""

    def __init__(self, wanted: Wanted, on_outcome: OnOutcome, address: PeerAddress | None = None) -> None:
        self.wanted = wanted
        self.address = address  #: where to dial again; None if it was asked for over one session
        self.on_outcome: OnOutcome | None = on_outcome
        self.stage = Stage.CONNECT
        self.generation = new_number()
        self.replaces = 0  #: the generation of the try before
        self.retries: list[tuple[float, Reason]] = []  #: when, and why the try before came to nothing
        self.lost: Reason | None = None  #: why the try before came to nothing
        self.kv_bytes = wanted.target.nbytes  #: in the cache
        self.nbytes = 0  #: on the wire
        self.peer = ""  #: whom it is asked of
        self.session: Session | None = None
        self.window = 0
        self.parts: PartFetch | None = None
        self.read: PageRead | None = None
        self.deadline: Timer | None = None
        self.again: Timer | None = None  #: until the next try
        self.asked_at = time.monotonic()
        self.subscribed_at = 0.0
        self.first_at = self.landed_at = self.decoded_at = 0.0  #: the first bytes, the last, all converted

    @property
    def left_ms(self) -> int:
        """Until its deadline; at least 1."""
        return max(1, int((self.asked_at + self.wanted.deadline_s - time.monotonic()) * 1000))

    @property
    def converting(self) -> PartFetch | PageRead | None:
        """What converts it, None where it comes as it is."""
        return self.parts or self.read

    def open_window(self, session: Session) -> int:
        """Over its target, or over the peer's pages where these are read. Raises OSError or ValueError."""
        if self.read is not None:
            return self.read.open_window(session, self.generation)
        return open_window(session.backend, session.connection, self.wanted.target, self.generation)

    def message(self, window: bytes, checksum: bool) -> m.Subscribe | m.SubscribeParts:
        """What asks for it, into ``window``."""
        wanted = self.wanted
        if self.read is not None:
            return self.read.message(self, window)
        return m.Subscribe(
            transfer_id=wanted.transfer_id,
            generation=self.generation,
            window=window,
            nbytes=self.nbytes,
            selection=wanted.target.selection,
            checksum=checksum,
            finished=wanted.finished,
            timeout_ms=self.left_ms,
            consumers=wanted.consumers,
            prompt=wanted.prompt,
            replaces=self.replaces,
        )

    @property
    def wire_dtype(self) -> str:
        return self.converting.plan.wire_dtype if self.converting else "same"

    def moved(self, first_ns: int, last_ns: int) -> None:
        """All its bytes are here; when the first and the last ones came, 0 if that was not told."""
        self.landed_at = last_ns / 1e9
        self.first_at = first_ns / 1e9 or self.subscribed_at

    def window_failed(self, session: Session, event: Event) -> None:
        """What is read in place and failed is staged over this session from now on."""
        if self.read is not None:
            session.stages = event.why

    @property
    def tries(self) -> int:
        return 1 + len(self.retries)

    def begin_again(self, why: Reason) -> None:
        """Nothing of the try before counts."""
        self.replaces, self.generation = self.generation, new_number()
        self.retries.append((time.monotonic(), why))
        self.stage = Stage.CONNECT
        self.session, self.window, self.parts, self.read = None, 0, None, None
        self.subscribed_at = self.first_at = self.landed_at = self.decoded_at = 0.0

    def lost_and(self, no_session: Reason) -> Reason:
        """Why it fails for want of a session: what lost the one before counts more."""
        if self.lost is None:
            return no_session
        self.stage = Stage.WAIT
        return Reason(self.lost.code, f"{self.lost.detail}; then {no_session.detail}")

    def arrived(self, session: Session) -> Outcome:
        """All of it is where it belongs."""
        plan = session.plan
        assert plan is not None
        stats = TransferStats(
            transfer_id=self.wanted.transfer_id,
            nbytes=self.nbytes,
            wait_s=self.subscribed_at - self.asked_at,
            transfer_s=(self.decoded_at or self.landed_at) - self.subscribed_at,
            backend=plan.backend,
            mode=session.mode(converted=self.converting is not None, read=self.read is not None),
            checksum=plan.checksum,
            wire_dtype=self.wire_dtype,
            peer=self.peer,
            security=plan.security,
        )
        return Outcome(self.wanted.transfer_id, stats)
