# SPDX-License-Identifier: Apache-2.0
"""One attempt to reach a peer over its addresses, one after the other, and who waits for it."""

from __future__ import annotations

from collections.abc import Callable

from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.engine.session.session import Session

#: Called once with the open session, or with why there is none.
OnSession = Callable[[Session | None, str], None]


class Dial:
    """Ends in one call of everybody who waits."""

    def __init__(self, peer: PeerAddress) -> None:
        self.peer = peer
        self._untried = list(peer.addresses)
        self._errors: dict[str, str] = {}
        self._waiting: list[OnSession] = []

    def wait(self, on_session: OnSession) -> None:
        self._waiting.append(on_session)

    def next_address(self) -> str | None:
        """The next one to try; None when all were."""
        return self._untried.pop(0) if self._untried else None

    def failed(self, address: str, why: str) -> None:
        """The first reason of an address counts: what follows only says that its connection ended."""
        self._errors.setdefault(address, why)

    def opened(self, session: Session) -> None:
        for on_session in self._waiting:
            on_session(session, "")

    def gave_up(self) -> None:
        why = "; ".join(f"{address}: {error}" for address, error in self._errors.items())
        text = f"no session with {self.peer.engine_id}[{self.peer.rank}]: {why or 'the peer gave no address'}"
        for on_session in self._waiting:
            on_session(None, text)
