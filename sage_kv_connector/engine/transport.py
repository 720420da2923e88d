# SPDX-License-Identifier: Apache-2.0
"""TransportEngine: move chunks of KV between processes from asyncio, without any inference engine.

It stands on the same EngineCore, and so on the same data plane, as the connectors.
A chunk is offered by ``send_kv_chunk`` and fetched by ``recv_kv_chunk`` of the same
transfer id and coordinates; either may be called first.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

import numpy as np

from sage_kv_connector.backends.base import Segments
from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.chunk import DeviceSpec, KVChunk, Segment
from sage_kv_connector.contract.failure import Code, Failure, Stage
from sage_kv_connector.contract.node import node_id
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.plan import Outcome, TransferPlan, TransferReport, TransferStats
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.engine.control.reachability import order_addresses
from sage_kv_connector.engine.core import EngineCore
from sage_kv_connector.engine.pages.memory import MemorySource
from sage_kv_connector.engine.pages.target import MemoryTarget
from sage_kv_connector.engine.transfer.offer import OfferTerms
from sage_kv_connector.engine.transfer.subscription import Subscription, Wanted


class TransferError(Exception):
    """A transfer ended without its bytes; the message says why, and so does ``failure`` (None: nobody needed it)."""

    def __init__(self, message: str, failure: Failure | None = None) -> None:
        super().__init__(message)
        self.failure = failure


class TransportEngine:
    """The asyncio face. Use as an async context manager, or call ``start`` and ``close``."""

    def __init__(
        self,
        config: KVTransportConfig | None = None,
        *,
        device: DeviceSpec | None = None,
        schema: KVCacheSchema | None = None,
    ) -> None:
        self._config = config or KVTransportConfig()
        self._device = device or DeviceSpec()
        self._core = EngineCore(self._config, schema=schema)

    @property
    def spec(self) -> DeviceSpec:
        """What a peer needs to know to reach this engine."""
        return DeviceSpec(
            kind=self._device.kind,
            index=self._device.index,
            numa_node=self._device.numa_node,
            addresses=self._core.addresses,
            engine_id=self._core.engine_id,
            node=node_id(),
        )

    def register_memory(self, segments: Iterable[Segment]) -> None:
        """Chunks may lie in this memory; it must stay valid until ``close``."""
        self._core.register_memory((s.address, s.length) for s in segments)

    def start(self) -> None:
        self._core.start()

    def close(self) -> None:
        self._core.close()

    def counters(self) -> dict[str, int]:
        return self._core.counters()

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    async def send_kv_chunk(self, chunk: KVChunk, dest: DeviceSpec) -> TransferStats:
        """Offer ``chunk`` to ``dest`` and return when all of it was sent; its memory is free then.

        Whether it arrived is the receiver's to say: one that cancels at that moment discards it.
        Raises TransferError when nobody fetched it within the lease, or the transfer failed.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Outcome] = loop.create_future()
        key = chunk.key()
        source = MemorySource(_segments(chunk))
        self._core.offer(key, source, _settle(loop, done), OfferTerms(only_for=dest.engine_id, finished=True))
        try:
            return _unwrap(await done)
        except asyncio.CancelledError:
            self._core.withdraw([key], "the sender cancelled it")
            raise

    async def recv_kv_chunk(
        self, chunk: KVChunk, src: DeviceSpec, *, deadline_s: float | None = None
    ) -> TransferStats:
        """Fetch ``chunk`` from ``src`` into ``chunk.payload``.

        Raises TransferError; the payload may then hold some of the bytes.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Outcome] = loop.create_future()
        started: list[Subscription] = []
        enabled = tuple(self._core.backends)
        peer = PeerAddress(src.engine_id, 0, order_addresses(src.addresses, src.node, enabled))
        target = MemoryTarget(_segments(chunk))
        wanted = Wanted(chunk.key(), target, False, deadline_s or self._config.deadline_s)
        self._core.subscribe(peer, wanted, _settle(loop, done), started.append)
        try:
            return _unwrap(await done)
        except asyncio.CancelledError:
            # It may not have begun yet; nothing is to be written into the payload when the caller goes on.
            await asyncio.to_thread(self._core.cancel_all, started)
            raise

    async def stream_pipeline(self, chunks: Iterable[KVChunk], plan: TransferPlan) -> TransferReport:
        """Send or receive chunks in order, ``plan.prefetch_depth`` of them in flight at a time.

        Raises TransferError of the first chunk that fails, after the others in flight ended.
        """
        begun = time.monotonic()
        window = asyncio.Semaphore(plan.prefetch_depth)
        tasks: list[asyncio.Task[TransferStats]] = []

        async def move(chunk: KVChunk) -> TransferStats:
            try:
                if plan.direction == "send":
                    return await asyncio.wait_for(self.send_kv_chunk(chunk, plan.peer), plan.deadline_s)
                return await self.recv_kv_chunk(chunk, plan.peer, deadline_s=plan.deadline_s)
            except TimeoutError:
                why = f"the deadline of {plan.deadline_s:g} s passed"
                late = Failure(Code.DEADLINE, Stage.HOLD, why)
                raise TransferError(f"{chunk.key()}: {late.reason}", late) from None
            finally:
                window.release()

        for chunk in chunks:
            await window.acquire()
            if any(task.done() and task.exception() is not None for task in tasks):
                break
            tasks.append(asyncio.create_task(move(chunk)))
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        stats = tuple(result for result in results if isinstance(result, TransferStats))
        return TransferReport(stats, sum(s.nbytes for s in stats), time.monotonic() - begun)


def _segments(chunk: KVChunk) -> Segments:
    if not chunk.payload:
        raise ValueError(f"payload of chunk {chunk.key()} is empty; it must name at least one segment")
    return np.array([(s.address, s.length) for s in chunk.payload], dtype=np.uint64)


def _settle(loop: asyncio.AbstractEventLoop, done: asyncio.Future[Outcome]) -> Callable[[Outcome], None]:
    """A callback for the control thread that settles ``done`` on its own loop."""

    def finish(outcome: Outcome) -> None:
        if not done.done():
            done.set_result(outcome)

    def report(outcome: Outcome) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(finish, outcome)

    return report


def _unwrap(outcome: Outcome) -> TransferStats:
    if outcome.stats is None:
        why = outcome.error or "nobody needed it"
        raise TransferError(f"{outcome.transfer_id}: {why}", outcome.failure)
    return outcome.stats
