# SPDX-License-Identifier: Apache-2.0
"""One attempt to reach a peer over its addresses, one after the other, and who waits for it."""

from __future__ import annotations

from collections.abc import Callable

from sage_kv_connector.contract.failure import Code, Reason
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.engine.session.session import Session

#: Called once with the open session, or with why there is none.
OnSession = Callable[[Session | Reason], None]


class Dial:
    """Ends in one call of everybody who waits."""

    def __init__(self, peer: PeerAddress) -> None:
        self.peer = peer
        self._untried = list(peer.addresses)
        self._errors: dict[str, Reason] = {}
        self._broke: set[str] = set()
        self._waiting: list[OnSession] = []

    def wait(self, on_session: OnSession) -> None:
        self._waiting.append(on_session)

    def next_address(self) -> str | None:
        """The next one to try; None when all were."""
        return self._untried.pop(0) if self._untried else None

    def resolved(self, addresses: tuple[str, ...]) -> None:
        """These stand for a name: they come next."""
        self._untried[:0] = addresses

    def broke(self, address: str) -> None:
        """It broke at once, or in the handshake: it is tried once more."""
        if address not in self._broke:
            self._broke.add(address)
            self._untried.insert(0, address)

    def failed(self, address: str, why: Reason) -> None:
        """The first reason of an address counts: what follows only says that its connection ended."""
        self._errors.setdefault(address, why)

    def opened(self, session: Session) -> None:
        for on_session in self._waiting:
            on_session(session)

    def gave_up(self) -> Code:
        """Who answered and refused says more than addresses where nobody answered. Returns the code of that."""
        errors = self._errors
        why = "; ".join(f"{address}: {error.detail}" for address, error in errors.items())
        text = f"no session with {self.peer.label}: {why or 'the peer gave no address'}"
        refused = (error.code for error in errors.values() if error.code is not Code.UNREACHABLE)
        reason = Reason(next(refused, Code.UNREACHABLE), text)
        for on_session in self._waiting:
            on_session(reason)
        return reason.code
