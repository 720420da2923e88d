# SPDX-License-Identifier: Apache-2.0
"""All sessions of one engine: dialled, accepted, opened by the handshake, found, lost.

Sessions to a peer are kept and reused. Control thread only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from sage_kv_connector.backends.base import Backend, Event, EventKind, Status
from sage_kv_connector.backends.protecting_backend import ProtectingBackend, TrafficKeys
from sage_kv_connector.config import SECRET_ENV, KVTransportConfig, Security
from sage_kv_connector.contract.failure import Code, Reason, reason_of_peer
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.engine.control.loop import ControlLoop
from sage_kv_connector.engine.control.names import Names, has_name, is_loopback
from sage_kv_connector.engine.control.reachability import scheme_of
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.session.agreement import plan_session, schema_verdict
from sage_kv_connector.engine.session.carrier import carrier_accepted, carrier_dialled
from sage_kv_connector.engine.session.dial import Dial, OnSession
from sage_kv_connector.engine.session.handshake import (
    AcceptorHandshake,
    ConnectorHandshake,
    HandshakeRefused,
    Identity,
    Peer,
)
from sage_kv_connector.engine.session.refusals import Refusals, code_of
from sage_kv_connector.engine.session.session import MESSAGES_A_SECOND, PROBED_S, Session
from sage_kv_connector.telemetry.recording.recorder import Recorder

logger = logging.getLogger(__name__)

#: A client's request may name any address: KV is not fetched from whoever answers there.
NO_SECRET = Reason(
    Code.BAD_SECRET,
    "it is not on this node, and others are dialled with a shared secret only: set secret, secret_file or "
    f"${SECRET_ENV} on every server",
)

#: Whoever was refused has this long to hear of it.
LINGER_S = 0.2


class SessionTable:
    """``on_message`` gets every message of open sessions, ``on_closed`` each loss of one."""

    def __init__(
        self,
        loop: ControlLoop,
        identity: Identity,
        config: KVTransportConfig,
        security: Security,
        backends: Mapping[str, Backend],
        on_message: Callable[[Session, m.Message], None],
        on_closed: Callable[[Session, str], None],
        recorder: Recorder,
    ) -> None:
        self._loop = loop
        self._identity = identity
        self._config = config
        self._security = security
        self._backends = backends
        self.addresses: tuple[str, ...] = ()  #: those that this engine is known by
        self.refusals = Refusals(lambda: recorder.on_changed())
        self._on_message = on_message
        self._on_closed = on_closed
        self._recorder = recorder
        self._sessions: dict[tuple[int, int], Session] = {}
        self._by_peer: dict[PeerAddress, Session] = {}
        self._dials: dict[PeerAddress, Dial] = {}
        self._names = Names(loop)
        #: What was sent over sessions of which nobody knows whether they live.
        self._unsure: dict[Session, list[tuple[PeerAddress, m.Message]]] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    def find(self, backend: Backend, connection: int) -> Session | None:
        return self._sessions.get((id(backend), connection))

    def get(self, peer: PeerAddress, on_session: OnSession) -> None:
        """The open session with ``peer``, dialled if there is none."""
        known = self._by_peer.get(peer)
        if known is not None:
            on_session(known)
            return
        dial = self._dials.get(peer)
        if dial is not None:
            dial.wait(on_session)
            return
        dial = self._dials[peer] = Dial(peer)
        dial.wait(on_session)
        self._dial_next(dial)

    def tell(self, peer: PeerAddress, message: m.Message) -> None:
        """Send it once there is a session. Over one that was idle it may get lost: it is sent again then, once."""
        self.get(peer, partial(self._tell, peer, message))

    def _tell(self, peer: PeerAddress, message: m.Message, session: Session | Reason) -> None:
        if isinstance(session, Reason):
            return
        if session.doubtful:
            self._unsure.setdefault(session, []).append((peer, message))
            session.hold()
            self._loop.call_later(PROBED_S, self._sure, session)
        session.send(message)

    def _sure(self, session: Session) -> None:
        """It lives: what was sent over it has arrived, or will."""
        if self._unsure.pop(session, None) is not None:
            session.drop()

    def describe(self, schema: KVCacheSchema) -> None:
        """Say this of our cache from now on, and end every session that was agreed on something else."""
        self._identity = self._identity._replace(schema=schema)
        for session in list(self._sessions.values()):
            if session.dialled is not None and session.open:
                self._by_peer.pop(session.dialled, None)
            session.close()

    def handle(self, backend: Backend, event: Event) -> None:
        """Connection events and messages; what belongs to windows and posts is not passed here."""
        session = self._sessions.get((id(backend), event.connection))
        if event.kind == EventKind.ACCEPTED:
            self._accepted(backend, event.connection, event.detail)
        elif event.kind == EventKind.TURNED_AWAY:
            who, _, why = event.detail.partition(": ")
            self.refusals.note(who, Reason(code_of(event), why), 1 + event.length)
        elif session is None:
            return
        elif event.kind == EventKind.CONNECTED:
            assert isinstance(session.handshake, ConnectorHandshake)
            backend.send(event.connection, session.handshake.hello)
        elif event.kind == EventKind.CLOSED:
            self._closed(session, event)
        elif event.kind == EventKind.MESSAGE:
            self._message(session, event.payload)

    def _accepted(self, backend: Backend, connection: int, address: str) -> None:
        info = backend.connection_info(connection)
        carrier = carrier_accepted(self._security, backend.capabilities, info, self.addresses)
        handshake = AcceptorHandshake(self._identity, carrier)
        self._add(backend, connection, handshake, address=address or info.peer)

    def _add(
        self,
        backend: Backend,
        connection: int,
        handshake: ConnectorHandshake | AcceptorHandshake,
        dialled: PeerAddress | None = None,
        address: str = "",
    ) -> None:
        timeout_s = self._config.peer_timeout_s
        session = Session(self._loop, timeout_s, backend, connection, handshake, dialled, address)
        self._sessions[(id(backend), connection)] = session
        session.deadline = self._loop.call_later(self._config.connect_timeout_s, self._late, session)

    def _late(self, session: Session) -> None:
        late = f"the handshake took longer than {self._config.connect_timeout_s:.1f} s"
        self.refusals.note(session.address, Reason(Code.UNREACHABLE, late))
        self._reject(session, Reason(Code.UNREACHABLE, late))

    def _dial_next(self, dial: Dial) -> None:
        while (address := dial.next_address()) is not None:
            backend = self._backends.get(scheme_of(address))
            if backend is None:
                dial.failed(address, Reason(Code.UNREACHABLE, "backend not enabled here"))
                continue
            leaves_node = backend.capabilities.crosses_nodes
            if leaves_node and has_name(address):
                named = partial(self._named, dial, address)
                self._names.look_up(address, self._config.connect_timeout_s, named)
                return
            if leaves_node and not self._identity.has_secret and not is_loopback(address):
                dial.failed(address, NO_SECRET)
                continue
            try:
                connection = backend.connect(address, self._config.connect_timeout_s)
            except (OSError, ValueError) as error:
                dial.failed(address, Reason(Code.UNREACHABLE, str(error)))
                continue
            carrier = carrier_dialled(self._security, backend.capabilities, address)
            handshake = ConnectorHandshake(self._identity, dial.peer.engine_id, carrier)
            self._add(backend, connection, handshake, dial.peer, address)
            return
        self._dials.pop(dial.peer, None)
        self._recorder.add("dials_total", (dial.gave_up(),))

    def _named(self, dial: Dial, address: str, found: tuple[str, ...] | Reason) -> None:
        if isinstance(found, Reason):
            dial.failed(address, found)
        else:
            dial.resolved(found)
        self._dial_next(dial)

    def _message(self, session: Session, payload: bytes) -> None:
        if session.handshake is None and not session.open:
            return  # it was refused
        try:
            if not session.may_say_more():
                raise m.ProtocolError(f"more than {MESSAGES_A_SECOND} messages a second")
            message = m.decode(payload)
            if not session.open:
                self._handshake(session, message, payload)
            else:
                self._on_message(session, message)
        except m.ProtocolError as error:
            self._refuse(session, Reason(Code.PROTOCOL, str(error)))
        except HandshakeRefused as error:
            self._refuse(session, Reason(error.code, str(error)))

    def _handshake(self, session: Session, message: m.Message, raw: bytes) -> None:
        match session.handshake, message:
            case AcceptorHandshake() as acceptor, m.Hello():
                session.backend.send(session.connection, acceptor.on_hello(message, raw))
            case AcceptorHandshake() as acceptor, m.Proof():
                peer, welcome = acceptor.on_proof(message, raw)
                self._protect(session, acceptor.keys)
                session.backend.authorize(session.connection)  # before the peer knows that it may send
                session.backend.send(session.connection, welcome)
                self._opened(session, peer)
            case ConnectorHandshake() as connector, m.Challenge():
                proof = connector.on_challenge(message, raw)
                self._protect(session, connector.keys, proof)
            case ConnectorHandshake() as connector, m.Welcome():
                peer = connector.on_welcome(message)
                session.backend.authorize(session.connection)
                self._opened(session, peer)
            case _, m.Reject():
                why = reason_of_peer(message.code, message.detail)
                if session.dialled is None:
                    self.refusals.note(session.address, why)
                self._reject(session, why)
            case _:
                raise m.ProtocolError(f"{type(message).__name__} is not expected in the handshake")

    def _protect(self, session: Session, keys: TrafficKeys | None, last_plain: bytes = b"") -> None:
        if keys is not None:
            assert isinstance(session.backend, ProtectingBackend)
            session.backend.protect(session.connection, keys, last_plain)
        elif last_plain:
            session.backend.send(session.connection, last_plain)

    def _opened(self, session: Session, peer: Peer) -> None:
        if session.deadline is not None:
            session.deadline.cancel()
        session.peer = peer
        session.handshake = None
        capabilities = session.backend.capabilities
        info = session.backend.connection_info(session.connection)
        security = self._security if capabilities.crosses_nodes else "none"
        session.plan = plan_session(capabilities.name, info, self._config, security)
        session.verdict = schema_verdict(self._identity.schema, peer.schema, capabilities)
        session.log_agreement(info.peer)
        if session.dialled is not None:
            self._by_peer[session.dialled] = session
            self._dials.pop(session.dialled).opened(session)
            self._recorder.add("dials_total", ("ok",))

    def _refuse(self, session: Session, why: Reason) -> None:
        if session.open:
            logger.warning("%s: %s", session.label, why)
        else:
            self.refusals.note(session.address, why)
        session.send(m.Reject(why.code, why.detail[: m.MAX_DETAIL]))
        if session.open:
            session.close()
            return
        # It is to hear why; who waits for the session is not to wait for that.
        session.handshake = None
        if session.deadline is not None:
            session.deadline.cancel()
        session.deadline = self._loop.call_later(LINGER_S, session.close)
        dialled, session.dialled = session.dialled, None
        if dialled is not None:
            self._dials[dialled].failed(session.address, why)
            self._dial_next(self._dials[dialled])

    def _reject(self, session: Session, why: Reason) -> None:
        if session.dialled is not None and not session.open:
            self._dials[session.dialled].failed(session.address, why)
        session.close()

    def _closed(self, session: Session, event: Event) -> None:
        why = event.why
        if session.deadline is not None:
            session.deadline.cancel()
        self._sessions.pop((id(session.backend), session.connection), None)
        if session.open:
            self._recorder.closed(session.moved(event.offset, event.length))
            if session.dialled is not None and self._by_peer.get(session.dialled) is session:
                del self._by_peer[session.dialled]
            bad = event.status in (Status.SILENT, Status.FORGED)
            level = logging.WARNING if bad else logging.INFO
            logger.log(level, "session with %s at %s ended: %s", session.label, session.address, why)
            self._on_closed(session, why)
            for peer, message in self._unsure.pop(session, ()):
                self.tell(peer, message)
            return
        if session.dialled is None:
            if event.status not in (Status.CANCELLED, Status.CONNECTION_LOST):
                self.refusals.note(session.address, Reason(code_of(event), why))
        else:
            dial = self._dials[session.dialled]
            dial.failed(session.address, Reason(Code.UNREACHABLE, why))
            soon = time.monotonic() - session.begun_at < self._config.connect_timeout_s / 2
            if soon and event.status == Status.CONNECTION_LOST:
                dial.broke(session.address)
            self._dial_next(dial)
