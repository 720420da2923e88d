# SPDX-License-Identifier: Apache-2.0
"""Where a transfer's time went: its stages follow each other, and together they are the whole.

decode:  connect (to a session) → wait (for prefill's first bytes) → wire → decode (what is converted) → report
prefill: wait (decode asked, prefill had not begun) → queue (until the first chunk is cut: pages become final, are
encoded, have their turn) → wire → report
an offer: compute (until prefill finished) → hold (until its memory is free)

A stage that was not reached has no entry; of a failure the last one ends with it. Times are those of
``time.monotonic``, which lanes use, too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from sage_kv_connector.contract.failure import Reason
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.contract.trace import TraceContext
from sage_kv_connector.engine.transfer.offer import Offer, Stream
from sage_kv_connector.engine.transfer.subscription import Subscription
from sage_kv_connector.telemetry.recording.snapshot import TransferRecord

#: Nothing but the lanes' own default yet.
PRIORITY = 0


def stages(begun: float, marks: Sequence[tuple[str, float]], ended: float) -> tuple[tuple[str, float], ...]:
    """``marks``: each stage and when it ended, 0 if it did not."""
    found: list[tuple[str, float]] = []
    at = begun
    for name, end in marks:
        if not end:
            return (*found, (name, max(0.0, ended - at)))
        found.append((name, max(0.0, end - at)))
        at = max(at, end)
    return (*found, ("report", max(0.0, ended - at)))


def incoming(subscription: Subscription, outcome: Outcome) -> TransferRecord:
    """A transfer that came in, or did not."""
    ended, begun = time.monotonic(), subscription.asked_at
    plan = subscription.session.plan if subscription.session else None
    marks = [
        ("connect", subscription.subscribed_at),
        ("wait", subscription.first_at),
        ("wire", subscription.landed_at),
    ]
    if subscription.parts is not None:
        marks.append(("decode", subscription.decoded_at))
    failure = outcome.failure
    return TransferRecord(
        transfer_id=outcome.transfer_id,
        side="decode",
        peer=subscription.peer,
        backend=plan.backend if plan else "",
        wire_dtype=subscription.wire_dtype,
        priority=PRIORITY,
        nbytes=subscription.nbytes,
        kv_bytes=subscription.kv_bytes,
        began=time.time() - (ended - begun),
        seconds=ended - begun,
        stages=stages(begun, marks, ended),
        code=failure.code if failure else "ok",
        detail=failure.detail if failure else "",
        trace=_text(subscription.wanted.trace),
        link=_text(subscription.wanted.offer_trace),
        retries=tuple((at - begun, why.code) for at, why in subscription.retries),
    )


def outgoing(offer: Offer, stream: Stream, why: Reason | None) -> TransferRecord:
    """What one consumer got of an offer, or why not."""
    ended, begun = time.monotonic(), stream.came_at
    plan = stream.session.plan
    marks = (("wait", stream.begun_at), ("queue", stream.first_at), ("wire", stream.sent_at))
    return TransferRecord(
        transfer_id=offer.transfer_id,
        side="prefill",
        peer=stream.session.label,
        backend=plan.backend if plan else "",
        wire_dtype=stream.wire_dtype,
        priority=PRIORITY,
        nbytes=stream.request.nbytes,
        kv_bytes=0,
        began=time.time() - (ended - begun),
        seconds=ended - begun,
        stages=stages(begun, marks, ended),
        code=why.code if why else "ok",
        detail=why.detail if why else "",
        trace=_text(offer.trace),
        family=offer.family,
    )


def held(offer: Offer, why: Reason | None) -> TransferRecord:
    """An offer from its beginning until its memory is free; ``why`` it ended, if not because all were served."""
    ended, begun = time.monotonic(), offer.offered_at
    finished = offer.finished_at
    return TransferRecord(
        transfer_id=offer.transfer_id,
        side="prefill",
        peer="",
        backend="",
        wire_dtype="",
        priority=PRIORITY,
        nbytes=0,
        kv_bytes=0,
        began=time.time() - (ended - begun),
        seconds=ended - begun,
        stages=(("compute", finished - begun), ("hold", ended - finished))
        if finished
        else (("compute", ended - begun),),
        code=why.code if why else "ok",
        detail=why.detail if why else "",
        trace=_text(offer.trace),
        family=offer.family,
    )


def _text(trace: TraceContext | None) -> str:
    return trace.text if trace else ""
