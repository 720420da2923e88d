# SPDX-License-Identifier: Apache-2.0
"""One connection to a peer: messages out, who holds it, and whether the peer still lives.

Life: CONNECTING → (handshake) → OPEN → CLOSED. Only an OPEN one carries anything but the
handshake. While something is in flight on it the backend watches the peer, and ends the
connection if it is silent for ``peer_timeout_s``. After idleness it finds out soon whether the connection
is still one: firewalls and balancers forget those that are quiet. Control thread only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable

from sage_kv_connector.backends.base import Backend
from sage_kv_connector.contract.peer import PeerAddress, rank_label
from sage_kv_connector.contract.plan import TransportPlan
from sage_kv_connector.engine.control.loop import ControlLoop
from sage_kv_connector.engine.control.timers import Timer
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.session.agreement import SchemaVerdict
from sage_kv_connector.engine.session.handshake import AcceptorHandshake, ConnectorHandshake, Peer
from sage_kv_connector.telemetry.recording.recorder import LinkBytes

logger = logging.getLogger(__name__)

#: A session without anything in flight for so long may be gone without a word.
IDLE_S = 1.0
#: Its peer's lanes have so long for a sign of life; by ``PROBED_S`` they gave one, or it was closed.
PROBE_S, PROBED_S = 1.2, 1.7
#: A peer that says more is not one of ours: a busy decode server says some hundred a second.
MESSAGES_A_SECOND, MESSAGES_AT_ONCE = 10_000, 20_000
#: Different things that are logged of one session, once each.
MAX_SAID = 16


class Session:
    """Owners of transfers ``hold`` it, so that it is watched while they wait."""

    def __init__(
        self,
        loop: ControlLoop,
        peer_timeout_s: float,
        backend: Backend,
        connection: int,
        handshake: ConnectorHandshake | AcceptorHandshake | None,
        dialled: PeerAddress | None = None,
        address: str = "",
    ) -> None:
        self._loop = loop
        self._peer_timeout_s = peer_timeout_s
        self.backend = backend
        self.connection = connection
        self.handshake = handshake  #: None once it is over: its keys are gone with it
        self.dialled = dialled  #: whom we asked for it; None when the peer connected to us
        self.address = address
        self.peer: Peer | None = None
        self.plan: TransportPlan | None = None
        self.verdict = SchemaVerdict()
        self.converts: bool | None = None  #: what comes in over it; found out with the first subscription
        self.stages = ""  #: why what comes in over it and is converted is staged from now on
        self._said: set[str] = set()
        self.deadline: Timer | None = None  #: of the handshake
        self._holders = 0
        self.begun_at = self._idle_since = time.monotonic()
        self._probe: Timer | None = None
        self._counted_at, self._allowance = self._idle_since, float(MESSAGES_AT_ONCE)

    @property
    def open(self) -> bool:
        return self.peer is not None

    @property
    def backend_name(self) -> str:
        return self.backend.capabilities.name

    @property
    def label(self) -> str:
        return (
            rank_label(self.peer.engine_id, self.peer.rank) if self.peer else f"connection {self.connection}"
        )

    def moved(self, sent: int, landed: int) -> LinkBytes:
        """So many bytes of KV went over it since it opened."""
        return LinkBytes(self.backend_name, self.connection, self.label, sent, landed)

    def log_agreement(self, place: str) -> None:
        """How KV travels from now on, or why it can't. ``place``: where the peer is, for people."""
        if self.verdict.refusal:
            logger.error("%s: KV can't move: %s", self.label, self.verdict.refusal)
        elif self.verdict.must_convert:
            logger.info("%s: KV is converted on the way: %s", self.label, self.verdict.must_convert)
        if self.verdict.no_kv_of:
            logger.warning(
                "%s: it has no KV of %s: their drafts begin without the prompt (tokens stay right). Give both servers "
                "the same draft model to hand its KV over as well",
                self.label,
                ", ".join(self.verdict.no_kv_of),
            )
        logger.info("session with %s over %s: %s", self.label, place, self.plan)

    def way(self) -> tuple[str, str]:
        """How bytes go now, and why not better: ``mode`` and ``reason`` of the plan, unless these change."""
        assert self.plan is not None
        if not self.backend.capabilities.mode_changes:
            return self.plan.mode, self.plan.reason
        info = self.backend.connection_info(self.connection)
        return info.mode, info.reason

    def mode(self, *, converted: bool, read: bool) -> str:
        """Of one transfer, as TransferStats has it."""
        if converted and self.backend.capabilities.device_memory:
            return "read" if read else "staged"
        mode, reason = self.way()
        if self.backend.capabilities.mode_changes:
            self.log_once(f"KV goes by {mode}{f', since {reason}' if reason else ''}")
        return mode

    def log_once(self, text: str) -> None:
        if text not in self._said and len(self._said) < MAX_SAID:
            self._said.add(text)
            logger.info("%s: %s", self.label, text)

    def may_say_more(self) -> bool:
        """Whether the peer keeps to ``MESSAGES_A_SECOND``, one more message included."""
        now = time.monotonic()
        earned = (now - self._counted_at) * MESSAGES_A_SECOND
        self._allowance = min(MESSAGES_AT_ONCE, self._allowance + earned) - 1
        self._counted_at = now
        return self._allowance >= 0

    def send(self, message: m.Message) -> None:
        """Queue a message; a full queue (the peer reads nothing) ends the session."""
        try:
            self.backend.send(self.connection, m.encode(message))
        except (BlockingIOError, ValueError) as error:
            logger.warning("session with %s: %s can't be sent: %s", self.label, type(message).__name__, error)
            self.close()

    def close(self) -> None:
        """End the connection; the table hears of it and tells whoever holds it."""
        self.backend.close_connection(self.connection)

    def hold(self) -> None:
        probe = self.doubtful
        self._holders += 1
        if self._holders > 1:
            return
        if probe:
            self.backend.watch(self.connection, PROBE_S)
            self._probe = self._loop.call_later(PROBED_S, self._as_usual)
        else:
            self._as_usual()

    def drop(self) -> None:
        self._holders -= 1
        if self._holders == 0:
            self._idle_since = time.monotonic()
            self._no_probe()
            self.backend.unwatch(self.connection)

    def _as_usual(self) -> None:
        self._no_probe()
        self.backend.watch(self.connection, self._peer_timeout_s)

    def _no_probe(self) -> None:
        if self._probe is not None:
            self._probe.cancel()
            self._probe = None

    @property
    def doubtful(self) -> bool:
        """Nothing has gone over it for a while, and what lies between may have forgotten it."""
        if self._holders or not self.backend.capabilities.crosses_nodes or self._peer_timeout_s <= PROBE_S:
            return False
        return time.monotonic() - self._idle_since > IDLE_S


def is_same_peer(one: Session, other: Session) -> bool:
    """Whether two sessions are with the same engine and rank."""
    return one.peer is not None and owner_of(one) == owner_of(other)


def owner_of(session: Session) -> Hashable:
    """Whom what is held for a session is counted for: the peer, over however many sessions."""
    return (session.peer.engine_id, session.peer.rank) if session.peer else session.connection
