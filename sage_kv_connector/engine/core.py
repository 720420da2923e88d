# SPDX-License-Identifier: Apache-2.0
"""One engine's transport: backends, control thread, sessions, producer, consumer.

Both faces of the package stand on this: the asyncio ``TransportEngine`` and the
connectors of inference engines, whose threads only submit and poll. Methods may
be called from any thread; callbacks come on the control thread and must be short.

Life: construct → register_memory → start → … → close (idempotent; everything in
flight ends with an error, every offer is released).
"""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any

from sage_kv_connector.backends import create_backend
from sage_kv_connector.backends.base import Backend, Event
from sage_kv_connector.backends.device_backend import DeviceBackend
from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.failure import Code, Reason
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.prompt import UNBOUND, PromptDigest
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.devices.runtime import DeviceMemory
from sage_kv_connector.engine.control.listen_address import listen_host, listen_on
from sage_kv_connector.engine.control.loop import ControlLoop
from sage_kv_connector.engine.control.reachability import backend_options, check_protection, enabled_backends
from sage_kv_connector.engine.conversion.chosen import start_conversions
from sage_kv_connector.engine.conversion.converters import Converters
from sage_kv_connector.engine.conversion.jobs import Conversions
from sage_kv_connector.engine.observed import Observed
from sage_kv_connector.engine.pages.source import Source
from sage_kv_connector.engine.routing import Routing
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.session.handshake import Identity
from sage_kv_connector.engine.session.questions import Handler, OnReply, Questions
from sage_kv_connector.engine.session.session import Session
from sage_kv_connector.engine.session.table import SessionTable
from sage_kv_connector.engine.transfer.consumer import Consumer
from sage_kv_connector.engine.transfer.offer import NO_TERMS, OfferTerms, OnReleased
from sage_kv_connector.engine.transfer.producer import Producer
from sage_kv_connector.engine.transfer.subscription import OnOutcome, Subscription, Wanted
from sage_kv_connector.telemetry.recording.json_lines import use_log_format
from sage_kv_connector.telemetry.recording.publishing import Publisher, publish
from sage_kv_connector.telemetry.recording.recorder import Recorder
from sage_kv_connector.telemetry.recording.snapshot import Sample, Snapshot
from sage_kv_connector.telemetry.recording.spans import open_spans

logger = logging.getLogger(__name__)

#: Engine threads wait at most this long for the control thread where they must be sure of its state.
CALL_TIMEOUT_S = 30.0


class EngineCore:
    """The transport of one worker process. ``device``: where the KV cache lies, if not in host memory."""

    def __init__(
        self,
        config: KVTransportConfig,
        *,
        engine_id: str = "",
        rank: int = 0,
        schema: KVCacheSchema | None = None,
        device: DeviceMemory | None = None,
    ) -> None:
        self.config = config
        use_log_format(config.log_format)
        if (schema is not None and schema.memory != "host") != (device is not None):
            raise ValueError(f"schema.memory is {schema.memory if schema else 'host'!r}, device is {device}")
        self._device = device
        self.engine_id = engine_id or secrets.token_hex(8)
        self.rank = rank
        accepted = config.resolved_secrets()
        self._host = listen_host(config, accepted[0])
        security = config.resolved_security(accepted[0])
        names = enabled_backends(config, on_device=device is not None)
        self.backends: dict[str, Backend] = {
            name: create_backend(name, backend_options(config)) for name in names
        }
        check_protection(security, self.backends.values())
        self._loop = ControlLoop(self._died)
        for backend in self.backends.values():
            if device is not None and isinstance(backend, DeviceBackend):
                backend.attach_device(device)
            self._loop.watch(backend, self._on_event, backend)
        self.recorder = Recorder(open_spans(config.otlp_endpoint, self.engine_id, rank))
        identity = Identity(self.engine_id, rank, accepted, schema)
        self.sessions = SessionTable(
            self._loop,
            identity,
            config,
            security,
            self.backends,
            lambda session, message: self._routing.on_message(session, message),
            lambda session, why: self._routing.on_closed(session, why),
            self.recorder,
        )
        self._observed = Observed(self.engine_id, rank, self.backends, self.sessions, self.recorder)
        self._conversions: Conversions | None = None
        self._converters: Converters | None = None
        if schema is not None and (device is not None or any(group.canonical for group in schema.groups)):
            self._conversions = start_conversions(config, schema, device, self.register_host_memory)
            self._conversions.attach(self._loop)
            self._converters = Converters(schema, self._conversions)
        self._producer = Producer(self._loop, config, self._converters, self.recorder)
        self._consumer = Consumer(self._loop, self.sessions, config, self._converters, self.recorder)
        self._questions = Questions(self._loop, self.sessions)
        self._routing = Routing(self.sessions, self._producer, self._consumer, self._questions)
        self._closed = False
        self._publisher: Publisher | None = None
        self.also_counted: Callable[[], Iterable[Sample]] = tuple
        self.addresses: tuple[str, ...] = ()

    def start(self, *, listen: bool = True) -> None:
        """Listen and run; without ``listen`` it only connects.

        Raises OSError naming the address that can't be bound.
        """
        if listen:
            self.addresses = listen_on(self.backends.values(), self._host, self.config, self.rank)
        self.sessions.addresses = self.addresses
        self._loop.start()
        if self.config.telemetry:
            self._publisher = publish(self.snapshot)

    def register_memory(self, extents: Iterable[tuple[int, int]]) -> None:
        """Let posts and windows use these (address, length) spans of the KV cache, until ``close``."""
        for address, length in extents:
            for backend in self.backends.values():
                if self._device is None:
                    backend.register_memory(address, length)
                elif isinstance(backend, DeviceBackend):
                    backend.register_device_memory(address, length)

    def register_host_memory(self, address: int, length: int) -> None:
        """The same for host memory that is no part of the KV cache, wherever that lies."""
        for backend in self.backends.values():
            backend.register_memory(address, length)

    def describe(self, schema: KVCacheSchema) -> None:
        """The same cache holds KV of something else from now on, such as other weights.

        Every session ends whose peer heard otherwise; they dial again.
        """
        self._loop.call(CALL_TIMEOUT_S, self._describe, schema)

    def _describe(self, schema: KVCacheSchema) -> None:
        if self._converters is not None:
            self._converters.schema = schema
        self.sessions.describe(schema)

    @property
    def control_thread(self) -> int:
        return self._loop.thread

    # -- producer

    def offer(
        self, transfer_id: str, source: Source, on_released: OnReleased, terms: OfferTerms = NO_TERMS
    ) -> None:
        """See :class:`Producer`."""
        self._loop.submit(self._producer.offer, transfer_id, source, on_released, terms)

    def update(self, transfer_id: str, change: Callable[..., object], *arguments: Any) -> None:
        """Run ``change(*arguments)`` (of the offer's source) here and now; what became ready is sent."""
        change(*arguments)
        self.advanced(transfer_id)

    def advanced(self, transfer_id: str) -> None:
        """An offer's source has changed. Lanes that wait for it know; whoever else serves it is told."""
        if self._producer.must_pump(transfer_id):
            self._loop.submit(self._producer.pump, transfer_id)

    def is_streaming(self, transfer_id: str) -> bool:
        """Whether somebody is being served right now; any thread may ask, the answer may be a step late."""
        return self._producer.is_streaming(transfer_id)

    def finish(self, transfer_id: str) -> None:
        self._loop.submit(self._producer.finish, transfer_id)

    def withdraw(self, transfer_ids: Iterable[str], detail: str, *, wait: bool = True) -> None:
        """Returns when no byte of these transfers' memory is read, or trusted at the peer, any more.

        ``detail``: why, for the consumers. Without ``wait`` it returns at once, and ``on_released`` of each offer
        says the same later.
        """
        withdrawn = (tuple(transfer_ids), Reason(Code.WITHDRAWN, detail))
        if wait:
            self._loop.call(CALL_TIMEOUT_S, self._producer.withdraw, *withdrawn)
        else:
            self._loop.submit(self._producer.withdraw, *withdrawn)

    def give_up(self, transfer_ids: Iterable[str], why: Reason) -> None:
        """``withdraw``, also what is not on offer (any more): nobody is to wait for it."""
        self._loop.call(CALL_TIMEOUT_S, self._producer.give_up, tuple(transfer_ids), why)

    # -- consumer

    def subscribe(
        self,
        peer: PeerAddress | Session,
        wanted: Wanted,
        on_outcome: OnOutcome,
        on_started: Callable[[Subscription], None] | None = None,
    ) -> None:
        """See :class:`Consumer`. A session as ``peer`` is that of a question."""
        self._loop.submit(self._consumer.subscribe, peer, wanted, on_outcome, on_started)

    def cancel(self, subscription: Subscription) -> None:
        self._loop.submit(self._consumer.cancel, subscription)

    def cancel_all(self, subscriptions: Collection[Subscription]) -> None:
        """End those that ``subscriptions`` holds once everything submitted before ran.

        Returns when nothing writes into their memory any more.
        """
        self._loop.call(CALL_TIMEOUT_S, self._consumer.cancel_all, subscriptions)

    def release(
        self,
        peer: PeerAddress,
        transfer_id: str,
        consumers: int = 1,
        detail: str = "",
        prompt: PromptDigest = UNBOUND,
    ) -> None:
        """Tell the producer that this consumer wants nothing of a transfer.

        ``detail``: why what was needed is given up, empty if it never was.
        """
        self._loop.submit(self.sessions.tell, peer, m.Release(transfer_id, consumers, detail, prompt))

    def renew(self, peer: PeerAddress, transfer_ids: tuple[str, ...]) -> None:
        """Ask the producer to keep these transfers for another lease."""
        for first in range(0, len(transfer_ids), m.MAX_RENEWED):
            self._loop.submit(self.sessions.tell, peer, m.Renew(transfer_ids[first : first + m.MAX_RENEWED]))

    # -- questions

    def ask(self, peer: PeerAddress, verb: str, body: bytes, on_reply: OnReply, timeout_s: float) -> None:
        """See :class:`Questions`; ``on_reply`` is called once. Raises ValueError for what no message can hold."""
        if not 0 < len(verb) <= m.MAX_VERB or len(body) > m.MAX_BODY:
            raise ValueError(
                f"question {verb[: m.MAX_VERB]!r} with a body of {len(body)} bytes: a verb has 1 to {m.MAX_VERB} "
                f"characters, a body at most {m.MAX_BODY} bytes"
            )
        self._loop.submit(self._questions.ask, peer, verb, body, on_reply, timeout_s)

    def serve(self, verb: str, handler: Handler) -> None:
        """Let ``handler`` answer the peers' questions with this verb, on the control thread, now or later."""
        self._loop.submit(self._questions.serve, verb, handler)

    # -- both

    def counters(self) -> dict[str, int]:
        """Totals of the lanes over all backends, and what is registered now (for leak checks)."""
        totals: Counter[str] = Counter()
        for backend in self.backends.values():
            totals.update(backend.counters())
        return dict(totals) | self._own_counters()

    def snapshot(self) -> Snapshot:
        """All numbers at this moment, with what its owner counts (``also_counted``). Any thread."""
        return self._observed.snapshot(self._own_counters(), self.also_counted())

    def _own_counters(self) -> dict[str, int]:
        conversions = {} if self._conversions is None else self._conversions.counters()
        return conversions | {
            "posting_ns": self._producer.posts.posting_ns,
            "offers": len(self._producer),
            "subscriptions": len(self._consumer),
            "questions": len(self._questions),
            "sessions": len(self.sessions),
        }

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._publisher is not None:
            self._publisher.close()
        try:
            self._loop.call(
                CALL_TIMEOUT_S, self._end_all, Reason(Code.SHUTTING_DOWN, "this engine shuts down")
            )
        finally:
            self._loop.stop()
            if self._conversions is not None:
                self._conversions.close()
            for backend in self.backends.values():
                backend.close()
            self.recorder.close()

    def _on_event(self, backend: Backend, event: Event) -> None:
        self._routing.on_event(backend, event)

    def _end_all(self, why: Reason) -> None:
        """Whatever is asked for, on offer or asked, now or from now on, ends with this reason."""
        for part in (self._questions, self._producer, self._consumer):
            part.close(why)

    def _died(self, why: str) -> None:
        """The control thread ended by a fault: nobody is left waiting, here or at a peer."""
        try:
            self._end_all(Reason(Code.INTERNAL, f"the transport's control thread ended: {why}"))
        finally:
            for backend in self.backends.values():
                backend.close()

    def check_alive(self) -> None:
        """Raises RuntimeError once the control thread ended by a fault, for an engine to say that it is not healthy."""
        if self._loop.death:
            raise RuntimeError(f"the KV transport of this worker ended by a fault: {self._loop.death}")
