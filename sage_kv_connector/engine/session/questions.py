# SPDX-License-Identifier: Apache-2.0
"""Questions and answers on sessions, for services that stand on the engine: a verb, a body, one answer.

A question that is asked here ends exactly once: with the peer's answer, or with a code and a
detail that say why there is none (no session, session lost, time over, shutting down). One
that a peer asks goes to the handler of its verb, which may answer later. Control thread only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import count
from typing import NamedTuple

from sage_kv_connector.contract.failure import Reason
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.engine.control.loop import ControlLoop
from sage_kv_connector.engine.control.timers import Timer
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.session.session import Session
from sage_kv_connector.engine.session.table import SessionTable

logger = logging.getLogger(__name__)

#: Questions of one session that may wait for their answer here; more are refused as ``busy``.
MAX_UNANSWERED = 1024


class Reply(NamedTuple):
    """How a question ended: an empty ``code`` means that ``body`` is the peer's answer.

    Codes of this side: ``unreachable``, ``lost``, ``late``, ``shutting_down``; of the other side:
    ``unknown_verb``, ``busy``, ``failed``, and those of the verb.
    """

    code: str
    detail: str
    body: bytes = b""

    @property
    def ok(self) -> bool:
        return not self.code


OnReply = Callable[[Reply], None]


class Question:
    """One that a peer asked. Answer it once, now or later; nothing happens if its session is gone."""

    def __init__(self, asked: Questions, session: Session, number: int) -> None:
        self._asked = asked
        self.session = session
        self.number = number

    def answer(self, body: bytes) -> None:
        """Raises ValueError for a body that no message can hold."""
        if len(body) > m.MAX_BODY:
            raise ValueError(f"body of an answer has {len(body)} bytes, at most {m.MAX_BODY} are allowed")
        self._asked.settle(self, m.Answer(self.number, "", "", body))

    def refuse(self, code: str, detail: str) -> None:
        self._asked.settle(self, m.Answer(self.number, code[: m.MAX_VERB], detail[: m.MAX_DETAIL], b""))


#: Called with the question and its body, which is the peer's and not checked.
Handler = Callable[[Question, bytes], None]


class _Asking:
    """A question of ours."""

    def __init__(self, on_reply: OnReply) -> None:
        self.on_reply: OnReply | None = on_reply
        self.session: Session | None = None
        self.timer: Timer | None = None


class Questions:
    """All questions of one engine, asked and to be answered."""

    def __init__(self, loop: ControlLoop, sessions: SessionTable) -> None:
        self._loop = loop
        self._sessions = sessions
        self._handlers: dict[str, Handler] = {}
        self._numbers = count(1)
        self._ended: Reply | None = None  #: why nothing is asked any more
        self._asking: dict[int, _Asking] = {}
        self._to_answer: dict[tuple[Session, int], Question] = {}

    def __len__(self) -> int:
        return len(self._asking) + len(self._to_answer)

    def serve(self, verb: str, handler: Handler) -> None:
        self._handlers[verb] = handler

    def ask(self, peer: PeerAddress, verb: str, body: bytes, on_reply: OnReply, timeout_s: float) -> None:
        if self._ended is not None:
            on_reply(self._ended)
            return
        number = next(self._numbers)
        asking = self._asking[number] = _Asking(on_reply)
        late = Reply("late", f"no answer within {timeout_s:.1f} s")
        asking.timer = self._loop.call_later(timeout_s, self._end, number, late)

        def tell(session: Session | Reason) -> None:
            if asking.on_reply is None:
                return
            if isinstance(session, Reason):
                self._end(number, Reply("unreachable", session.detail))
                return
            asking.session = session
            session.hold()
            session.send(m.Ask(number, verb, body))

        self._sessions.get(peer, tell)

    def on_ask(self, session: Session, message: m.Ask) -> None:
        key = (session, message.number)
        if key in self._to_answer:
            raise m.ProtocolError(f"number {message.number} is that of a question without an answer yet")
        question = Question(self, session, message.number)
        handler = self._handlers.get(message.verb)
        open_here = sum(1 for other, _ in self._to_answer if other is session)
        self._to_answer[key] = question
        if handler is None:
            served = ", ".join(sorted(self._handlers)) or "none"
            question.refuse("unknown_verb", f"verb {message.verb!r} is not served here; served: {served}")
        elif open_here >= MAX_UNANSWERED:
            question.refuse("busy", f"{MAX_UNANSWERED} questions of this session wait for their answers")
        else:
            try:
                handler(question, message.body)
            except Exception:
                logger.exception("%s: question %r could not be answered", session.label, message.verb)
                question.refuse("failed", "the handler of this verb failed")

    def on_answer(self, session: Session, message: m.Answer) -> None:
        """An answer that came too late, or to what this session was not asked, is nothing."""
        asking = self._asking.get(message.number)
        if asking is not None and asking.session is session:
            self._end(message.number, Reply(message.code, message.detail, message.body))

    def on_closed(self, session: Session, why: str) -> None:
        for key in [key for key in self._to_answer if key[0] is session]:
            del self._to_answer[key]
        for number in [n for n, asking in self._asking.items() if asking.session is session]:
            self._end(number, Reply("lost", f"the session was lost: {why}"))

    def close(self, why: Reason) -> None:
        """Every question of ours ends, and each that comes."""
        self._ended = Reply(why.code, why.detail)
        for number in list(self._asking):
            self._end(number, self._ended)

    def settle(self, question: Question, answer: m.Answer) -> None:
        if self._to_answer.pop((question.session, question.number), None) is question:
            question.session.send(answer)

    def _end(self, number: int, reply: Reply) -> None:
        asking = self._asking.pop(number, None)
        if asking is None:
            return
        report, asking.on_reply = asking.on_reply, None
        if asking.timer is not None:
            asking.timer.cancel()
        if asking.session is not None:
            asking.session.drop()
        if report is not None:
            report(reply)
