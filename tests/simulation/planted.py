# SPDX-License-Identifier: Apache-2.0
"""Faults planted in the engine: a run of schedules must find each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from sage_kv_connector.engine.control.loop import ControlLoop
from sage_kv_connector.engine.conversion.staging import StagingArena
from sage_kv_connector.engine.pages.paged import PagedSource
from sage_kv_connector.engine.session.session import Session
from sage_kv_connector.engine.transfer import offer, subscription
from sage_kv_connector.engine.transfer.consumer import Consumer
from sage_kv_connector.engine.transfer.early import Early
from sage_kv_connector.engine.transfer.offer import Offer, Stream
from sage_kv_connector.engine.transfer.producer import Producer
from sage_kv_connector.engine.transfer.windows import Windows


def _nothing(*_: object, **__: object) -> None:
    return None


@contextmanager
def _replaced(owner: type, name: str, replacement: Any) -> Iterator[None]:
    with mock.patch.object(owner, name, replacement):
        yield


def _lease_not_restarted() -> Any:
    """The lease runs from the end of prefill only, not again once a reader is gone."""
    real = Producer._served

    def served(self: Producer, *arguments: Any) -> None:
        with mock.patch.object(self, "_start_lease", _nothing):
            real(self, *arguments)

    return _replaced(Producer, "_served", served)


def _late_timers() -> Any:
    """Deadlines of a load are never looked at."""
    real = Consumer.subscribe

    def subscribe(self: Consumer, *arguments: Any) -> None:
        real(self, *arguments)
        for one in self._open:
            if one.deadline is not None:
                one.deadline.cancel()

    return _replaced(Consumer, "subscribe", subscribe)


def _released_while_sending() -> Any:
    """A withdrawn offer's pages are free though its posts are not revoked."""
    real = Producer.withdraw

    def withdraw(self: Producer, *arguments: Any) -> None:
        with mock.patch.object(Stream, "stop", lambda stream: stream.session.drop()):
            real(self, *arguments)

    return _replaced(Producer, "withdraw", withdraw)


def _window_left_open() -> Any:
    """A load that failed leaves its window to the peer."""
    return _replaced(Windows, "close", _nothing)


def _delivered_too_early() -> Any:
    """The first post that is begun counts as the last one that ended."""
    return _replaced(Stream, "delivered", property(lambda stream: stream.posted))


def _any_prompt() -> Any:
    """Whose KV it is, is not compared."""
    return _replaced(Offer, "differs", lambda self, prompt: None)


def _staging_kept() -> Any:
    """What a part stream leased is not given back."""
    return _replaced(StagingArena, "release", _nothing)


def _session_kept() -> Any:
    """Who ended still holds the session."""
    return _replaced(Session, "drop", _nothing)


def _early_forgotten() -> Any:
    """A subscription that waited in vain hears nothing, and stays."""
    return _replaced(Early, "_late", _nothing)


def _answered_twice() -> Any:
    """A load's outcome is not remembered."""
    real = Consumer._end

    def end(self: Consumer, ended: Any, outcome: Any) -> None:
        report = ended.on_outcome
        real(self, ended, outcome)
        ended.on_outcome = report

    return _replaced(Consumer, "_end", end)


def _generation_not_new() -> Any:
    """Every subscription has the generation of the one before."""
    return mock.patch.object(subscription, "new_number", lambda: 1)


def _not_tried_again() -> Any:
    """A load whose session is lost fails, be it that nothing moved."""
    real = Consumer._lost

    def lost(self: Consumer, ended: Any, why: Any) -> None:
        ended.tries = 2
        real(self, ended, why)

    return _replaced(Consumer, "_lost", lost)


def _peers_not_counted() -> Any:
    """One peer may have whatever all may have together."""
    return mock.patch.object(offer, "owner_of", lambda session: object())


def _not_probed() -> Any:
    """A connection that was idle is trusted as any other."""
    return _replaced(Session, "doubtful", property(lambda session: False))


def _release_dropped() -> Any:
    """Who wants nothing is waited for."""
    return _replaced(Producer, "on_release", _nothing)


def _lost_session_ignored() -> Any:
    """The streams of a session that is gone go on."""
    return _replaced(Producer, "on_closed", _nothing)


def _final_before_computed() -> Any:
    """The engine counts all pages of a layer as final with the first."""
    real = PagedSource.advance_all
    return _replaced(PagedSource, "advance_all", lambda self, pages: real(self, tuple(n + 1 for n in pages)))


def _orders_overtake() -> Any:
    """What was ordered first is carried out last."""
    real = ControlLoop._run_orders

    def run(self: ControlLoop, *arguments: Any) -> None:
        if not arguments:
            self._orders.reverse()
        real(self, *arguments)

    return _replaced(ControlLoop, "_run_orders", run)


PLANTED: dict[str, Callable[[], Any]] = {
    "lease_not_restarted": _lease_not_restarted,
    "deadline_missing": _late_timers,
    "pages_freed_while_sent": _released_while_sending,
    "window_left_open": _window_left_open,
    "delivered_too_early": _delivered_too_early,
    "prompt_not_compared": _any_prompt,
    "staging_memory_kept": _staging_kept,
    "peers_not_counted": _peers_not_counted,
    "not_tried_again": _not_tried_again,
    "not_probed": _not_probed,
    "session_kept": _session_kept,
    "early_subscription_forgotten": _early_forgotten,
    "answered_twice": _answered_twice,
    "generation_not_new": _generation_not_new,
    "release_dropped": _release_dropped,
    "lost_session_ignored": _lost_session_ignored,
    "final_before_computed": _final_before_computed,
    "orders_overtake": _orders_overtake,
}
