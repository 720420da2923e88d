# SPDX-License-Identifier: Apache-2.0
"""Authenticated connections to peers: handshake, schema comparison, liveness, messages.

Life of a session: CONNECTING → (handshake) → OPEN → CLOSED. Only an OPEN one
carries anything but the handshake. Sessions to a peer are kept and reused;
while something is in flight on one it is pinged, so that a peer that went
silent is given up after ``peer_timeout_s``. All of this runs on the control thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from sage_kv_connector.backends.base import Backend, ConnectionInfo, Event, EventKind, Status
from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.plan import TransportPlan
from sage_kv_connector.contract.schema import Verdict
from sage_kv_connector.engine.control.loop import ControlLoop, Timer
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.session.handshake import (
    AcceptorHandshake,
    ConnectorHandshake,
    HandshakeRefused,
    Identity,
    Peer,
)
from sage_kv_connector.format.converter import GroupConverter

logger = logging.getLogger(__name__)


class Session:
    """One connection. Owners of transfers ``hold`` it, so that it is watched while they wait."""

    def __init__(
        self,
        table: SessionTable,
        backend: Backend,
        connection: int,
        dial: _Dial | None = None,
        address: str = "",
    ) -> None:
        self._table = table
        self.backend = backend
        self.connection = connection
        self.dial = dial  #: what asked for it; None when the peer connected to us
        self.address = address
        self.peer: Peer | None = None
        self.plan: TransportPlan | None = None
        self.refusal = ""  #: why no KV may move on this open session (schemas differ); empty if it may
        self._converters: dict[tuple[object, ...], GroupConverter] = {}  #: made for this peer's schema
        self.must_convert = (
            ""  #: why pages can't go as they are (schemas differ, convertibly); empty if they can
        )
        self.handshake: ConnectorHandshake | AcceptorHandshake | None = None
        self.deadline: Timer | None = None
        self._holders = 0
        self._last_heard = 0
        self._last_pinged = 0
        self._pinger: Timer | None = None

    def converter(self, key: tuple[object, ...], make: Callable[[], GroupConverter]) -> GroupConverter:
        """The converter under ``key``, made once."""
        found = self._converters.get(key)
        if found is None:
            found = self._converters[key] = make()
        return found

    @property
    def open(self) -> bool:
        return self.peer is not None

    def send(self, message: m.Message) -> None:
        """Queue a message; a full queue (the peer reads nothing) ends the session."""
        try:
            self.backend.send(self.connection, m.encode(message))
        except (BlockingIOError, ValueError) as error:
            logger.warning("session with %s: %s can't be sent: %s", self.label, type(message).__name__, error)
            self.backend.close_connection(self.connection)

    @property
    def label(self) -> str:
        return f"{self.peer.engine_id}[{self.peer.rank}]" if self.peer else f"connection {self.connection}"

    def hold(self) -> None:
        self._holders += 1
        if self._pinger is None:
            self._last_heard = self._last_pinged
            self._schedule_ping()

    def drop(self) -> None:
        self._holders -= 1

    def heard(self, message: m.Ping | m.Pong) -> None:
        if isinstance(message, m.Ping):
            self.send(m.Pong(message.sequence))
        else:
            self._last_heard = max(self._last_heard, min(message.sequence, self._last_pinged))

    def _schedule_ping(self) -> None:
        interval = self._table.config.peer_timeout_s / 3
        self._pinger = self._table.loop.call_later(interval, self._ping)

    def _ping(self) -> None:
        self._pinger = None
        if not self.open or not self._holders:
            return
        if self._last_pinged - self._last_heard >= 3:
            logger.warning("%s is silent for %.0f s", self.label, self._table.config.peer_timeout_s)
            self.backend.close_connection(self.connection)
            return
        self._last_pinged += 1
        self.send(m.Ping(self._last_pinged))
        self._schedule_ping()

    def close_timers(self) -> None:
        for timer in (self.deadline, self._pinger):
            if timer is not None:
                timer.cancel()


#: Called once with the open session, or with why there is none.
OnSession = Callable[[Session | None, str], None]


class _Dial:
    """One attempt to reach a peer over its addresses, one after the other."""

    def __init__(self, peer: PeerAddress) -> None:
        self.peer = peer
        self.untried = list(peer.addresses)
        self.errors: list[str] = []
        self.waiting: list[OnSession] = []


class SessionTable:
    """All sessions of one engine. ``on_message`` gets every message of open sessions, ``on_closed`` each loss."""

    def __init__(
        self,
        identity: Identity,
        config: KVTransportConfig,
        backends: dict[str, Backend],
        on_message: Callable[[Session, m.Message], None],
        on_closed: Callable[[Session, str], None],
    ) -> None:
        self.config = config
        self.loop: ControlLoop
        self._identity = identity
        self._backends = backends
        self._on_message = on_message
        self._on_closed = on_closed
        self._sessions: dict[tuple[int, int], Session] = {}
        self._by_peer: dict[PeerAddress, Session] = {}
        self._dials: dict[PeerAddress, _Dial] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def set_schema(self, identity: Identity) -> None:
        """Register what this side offers; sessions opened from now on compare it."""
        self._identity = identity

    def find(self, backend: Backend, connection: int) -> Session | None:
        return self._sessions.get((id(backend), connection))

    def get(self, peer: PeerAddress, on_session: OnSession) -> None:
        """The open session with ``peer``, dialled if there is none."""
        known = self._by_peer.get(peer)
        if known is not None:
            on_session(known, "")
            return
        dial = self._dials.get(peer)
        if dial is not None:
            dial.waiting.append(on_session)
            return
        dial = self._dials[peer] = _Dial(peer)
        dial.waiting.append(on_session)
        self._dial_next(dial)

    def handle(self, backend: Backend, event: Event) -> None:
        """Connection events and messages; what belongs to windows and posts is not passed here."""
        session = self._sessions.get((id(backend), event.connection))
        if event.kind == EventKind.ACCEPTED:
            self._add(Session(self, backend, event.connection)).handshake = AcceptorHandshake(self._identity)
        elif session is None:
            return
        elif event.kind == EventKind.CONNECTED:
            assert isinstance(session.handshake, ConnectorHandshake)
            backend.send(event.connection, session.handshake.hello)
        elif event.kind == EventKind.CLOSED:
            self._closed(session, event.detail or Status(event.status).name.lower())
        elif event.kind == EventKind.MESSAGE:
            self._message(session, event.payload)

    def _add(self, session: Session) -> Session:
        self._sessions[(id(session.backend), session.connection)] = session

        def late() -> None:
            logger.warning(
                "handshake with %s took longer than %.1f s", session.label, self.config.connect_timeout_s
            )
            session.backend.close_connection(session.connection)

        session.deadline = self.loop.call_later(self.config.connect_timeout_s, late)
        return session

    def _dial_next(self, dial: _Dial) -> None:
        while dial.untried:
            address = dial.untried.pop(0)
            backend = self._backends.get(address.partition("://")[0])
            if backend is None:
                dial.errors.append(f"{address}: backend not enabled here")
                continue
            try:
                connection = backend.connect(address, self.config.connect_timeout_s)
            except (OSError, ValueError) as error:
                dial.errors.append(f"{address}: {error}")
                continue
            session = self._add(Session(self, backend, connection, dial, address))
            session.handshake = ConnectorHandshake(self._identity, dial.peer.engine_id)
            return
        self._dials.pop(dial.peer, None)
        why = "; ".join(dial.errors) or "the peer gave no address"
        for on_session in dial.waiting:
            on_session(None, f"no session with {dial.peer.engine_id}[{dial.peer.rank}]: {why}")

    def _message(self, session: Session, payload: bytes) -> None:
        try:
            message = m.decode(payload)
            if not session.open:
                self._handshake(session, message, payload)
            elif isinstance(message, m.Ping | m.Pong):
                session.heard(message)
            else:
                self._on_message(session, message)
        except m.ProtocolError as error:
            self._refuse(session, "protocol", str(error))
        except HandshakeRefused as error:
            self._refuse(session, error.code, str(error))

    def _handshake(self, session: Session, message: m.Message, raw: bytes) -> None:
        match session.handshake, message:
            case AcceptorHandshake() as acceptor, m.Hello():
                session.backend.send(session.connection, acceptor.on_hello(message, raw))
            case AcceptorHandshake() as acceptor, m.Proof():
                peer, welcome = acceptor.on_proof(message, raw)
                session.backend.send(session.connection, welcome)
                self._opened(session, peer)
            case ConnectorHandshake() as connector, m.Challenge():
                session.backend.send(session.connection, connector.on_challenge(message, raw))
            case ConnectorHandshake() as connector, m.Welcome():
                self._opened(session, connector.on_welcome(message))
            case _, m.Reject():
                self._reject(session, f"refused by the peer ({message.code}): {message.detail}")
            case _:
                raise m.ProtocolError(f"{type(message).__name__} is not expected in the handshake")

    def _opened(self, session: Session, peer: Peer) -> None:
        session.close_timers()
        session.peer = peer
        session.backend.authorize(session.connection)
        info = session.backend.connection_info(session.connection)
        session.plan = plan_session(session.backend.capabilities.name, info, self.config)
        ours = self._identity.schema
        if ours is not None and peer.schema is not None:
            comparison = ours.compare(peer.schema)
            if comparison.verdict is Verdict.INCOMPATIBLE:
                session.refusal = comparison.explain()
                logger.error("%s: KV can't move: %s", session.label, session.refusal)
            elif comparison.verdict is Verdict.CONVERTIBLE:
                session.must_convert = comparison.explain()
                logger.info("%s: KV is converted on the way: %s", session.label, session.must_convert)
            elif ours.memory != "host" and not session.backend.capabilities.device_memory:
                session.must_convert = (
                    f"memory: {ours.memory} on both sides, {session.plan.backend} takes host"
                )
                if not all(group.canonical for group in ours.groups):
                    session.refusal = f"{session.must_convert}; pages of unknown order can't be staged"
                    logger.error("%s: KV can't move: %s", session.label, session.refusal)
        logger.info("session with %s over %s: %s", session.label, info.peer, session.plan)
        if session.dial is not None:
            self._dials.pop(session.dial.peer, None)
            self._by_peer[session.dial.peer] = session
            for on_session in session.dial.waiting:
                on_session(session, "")

    def _refuse(self, session: Session, code: str, detail: str) -> None:
        logger.warning("%s: %s (%s)", session.label, detail, code)
        session.send(m.Reject(code, detail[: m.MAX_DETAIL]))
        self._reject(session, detail)

    def _reject(self, session: Session, detail: str) -> None:
        if session.dial is not None and not session.open:
            session.dial.errors.append(f"{session.address}: {detail}")
        session.backend.close_connection(session.connection)

    def _closed(self, session: Session, why: str) -> None:
        session.close_timers()
        self._sessions.pop((id(session.backend), session.connection), None)
        dial = session.dial
        if session.open:
            if dial is not None:
                self._by_peer.pop(dial.peer, None)
            logger.info("session with %s ended: %s", session.label, why)
            self._on_closed(session, why)
        elif dial is not None:
            if not any(error.startswith(session.address) for error in dial.errors):
                dial.errors.append(f"{session.address}: {why}")
            self._dial_next(dial)


def plan_session(backend: str, info: ConnectionInfo, config: KVTransportConfig) -> TransportPlan:
    """What applies to every transfer of one session."""
    checksum = {"crc": True, "generation": False, "auto": info.crosses_wire}[config.integrity]
    return TransportPlan(
        backend=backend, mode=info.mode, reason=info.reason, lanes=info.lanes, checksum=checksum
    )
