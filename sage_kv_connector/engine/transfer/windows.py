# SPDX-License-Identifier: Apache-2.0
"""Open windows of all transfers on their way in: who gets a window's events, whose a generation is."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING

from sage_kv_connector.backends.base import Event, Status
from sage_kv_connector.contract.failure import Code, Reason
from sage_kv_connector.engine.session.session import Session

if TYPE_CHECKING:
    from sage_kv_connector.engine.transfer.subscription import Subscription

#: Called with WINDOW_DONE and WINDOW_FAILED of one window.
Receiver = Callable[[Event], None]


def new_number() -> int:
    """A generation, or the number of a consumer, that no other has; never 0."""
    return secrets.randbits(63) | 1


_CODES = {
    Status.CHECKSUM_MISMATCH: Code.CHECKSUM,
    Status.FORGED: Code.FORGED,
    Status.NOT_CONVERTED: Code.CONVERSION,
}


def failure(event: Event, where: str) -> Reason:
    """Of a WINDOW_FAILED: status, ``where`` it happened, and the backend's words."""
    text = f"{event.status_name} {where}" + (f": {event.detail}" if event.detail else "")
    return Reason(_CODES.get(Status(event.status), Code.LANDING), text)


class Windows:
    """Of one engine. Control thread only."""

    def __init__(self) -> None:
        self._receivers: dict[tuple[int, int], Receiver] = {}
        self._owners: dict[int, Subscription] = {}

    def own(self, generation: int, owner: Subscription) -> None:
        """What the producer says of this generation is about this subscription."""
        self._owners[generation] = owner

    def opened(self, session: Session, window: int, receiver: Receiver) -> None:
        """The peer may fill a window from now on."""
        self._receivers[(id(session.backend), window)] = receiver

    def close(self, session: Session, window: int) -> int:
        """After this nothing writes into the window's memory, and its events go nowhere.

        Returns the bytes that landed.
        """
        self._receivers.pop((id(session.backend), window), None)
        return session.backend.close_window(window)

    def forget(self, generation: int) -> None:
        """Nothing that the producer says of it matters any more."""
        self._owners.pop(generation, None)

    def handle(self, session: Session, event: Event) -> None:
        """That the connection is gone is the session's to say, a moment later."""
        if event.status == Status.CONNECTION_LOST:
            return
        receiver = self._receivers.get((id(session.backend), event.id))
        if receiver is not None:
            receiver(event)

    def owner(self, generation: int) -> Subscription | None:
        return self._owners.get(generation)
