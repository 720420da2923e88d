# SPDX-License-Identifier: Apache-2.0
"""One transfer on its way in: what is wanted, and how far it came."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from sage_kv_connector.contract.failure import Stage
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.contract.prompt import UNBOUND, PromptDigest
from sage_kv_connector.engine.control.timers import Timer
from sage_kv_connector.engine.pages.target import Target
from sage_kv_connector.engine.session.session import Session
from sage_kv_connector.engine.transfer.windows import new_number

if TYPE_CHECKING:
    from sage_kv_connector.engine.transfer.part_fetch import PartFetch


OnOutcome = Callable[[Outcome], None]


class Wanted(NamedTuple):
    """What to fetch, and where it goes.

    ``finished``: prefill is known to be over. ``consumers``: so many read this transfer from the same producer.
    ``prompt``: whose KV it must be.
    """

    transfer_id: str
    target: Target
    finished: bool
    deadline_s: float
    consumers: int = 1
    prompt: PromptDigest = UNBOUND


class Subscription:
    """The handle of one that was asked for; ``on_outcome`` is None once it ended."""

    def __init__(self, wanted: Wanted, on_outcome: OnOutcome) -> None:
        self.wanted = wanted
        self.on_outcome: OnOutcome | None = on_outcome
        self.stage = Stage.CONNECT
        self.generation = new_number()
        self.nbytes = 0
        self.peer = ""  #: whom it is asked of
        self.session: Session | None = None
        self.window = 0
        self.parts: PartFetch | None = None
        self.deadline: Timer | None = None
        self.asked_at = time.monotonic()
        self.subscribed_at = 0.0
