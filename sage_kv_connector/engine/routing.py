# SPDX-License-Identifier: Apache-2.0
"""Who gets what a backend and a peer tell: events to sessions, streams and windows, messages to whom they concern.

Control thread only.
"""

from __future__ import annotations

import logging

from sage_kv_connector.backends.base import Backend, Event, EventKind
from sage_kv_connector.contract.failure import reason_of_peer
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.session.questions import Questions
from sage_kv_connector.engine.session.session import Session
from sage_kv_connector.engine.session.table import SessionTable
from sage_kv_connector.engine.transfer.consumer import Consumer
from sage_kv_connector.engine.transfer.producer import Producer

logger = logging.getLogger(__name__)


class Routing:
    """Of one engine."""

    def __init__(
        self, sessions: SessionTable, producer: Producer, consumer: Consumer, questions: Questions
    ) -> None:
        self._sessions = sessions
        self._producer = producer
        self._consumer = consumer
        self._questions = questions

    def on_event(self, backend: Backend, event: Event) -> None:
        if event.kind not in (EventKind.SENT, EventKind.WINDOW_DONE, EventKind.WINDOW_FAILED):
            self._sessions.handle(backend, event)
            return
        session = self._sessions.find(backend, event.connection)
        if session is None:
            return
        if event.kind == EventKind.SENT:
            self._producer.on_sent(session, event)
        else:
            self._consumer.on_window(session, event)

    def on_message(self, session: Session, message: m.Message) -> None:
        """Of an open session. Raises ProtocolError for what has no place there."""
        match message:
            case m.Subscribe() | m.SubscribeParts():
                self._producer.on_subscribe(session, message)
            case m.Cancel():
                self._producer.on_cancel(session, message)
            case m.Release():
                self._producer.on_release(session, message)
            case m.Renew():
                self._producer.on_renew(message)
            case m.Ask():
                self._questions.on_ask(session, message)
            case m.Answer():
                self._questions.on_answer(session, message)
            case m.Grant():
                self._producer.on_grant(session, message)
            case m.PartsReady():
                self._consumer.on_ready(session, message)
            case m.Failed():
                self._consumer.on_failed(session, message)
            case m.Reject():
                logger.warning(
                    "%s ended the session: %s", session.label, reason_of_peer(message.code, message.detail)
                )
                session.close()
            case _:
                raise m.ProtocolError(f"{type(message).__name__} is not expected in an open session")

    def on_closed(self, session: Session, why: str) -> None:
        self._producer.on_closed(session, why)
        self._consumer.on_closed(session, why)
        self._questions.on_closed(session, why)
