# SPDX-License-Identifier: Apache-2.0
"""The asyncio face: chunks that move, those that don't, and those that nobody wants any more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sage_kv_connector import DeviceSpec, KVChunk, Segment, TransferPlan, TransportEngine
from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.chunk import KVCoordinates
from sage_kv_connector.engine.transport import TransferError

BYTES = 5000
Memory = npt.NDArray[np.uint8]
Case = Callable[["Ends"], Coroutine[Any, Any, None]]


class Ends:
    """Two engines of one process, each with memory for some chunks."""

    def __init__(self, **options: Any) -> None:
        config = KVTransportConfig.load({"backend": "tcp", "host": "127.0.0.1", "lease_s": 10.0, **options})
        self.prefill, self.decode = TransportEngine(config), TransportEngine(config)
        self.source = np.random.default_rng(0).integers(0, 256, (8, BYTES), dtype=np.uint8)
        self.target = np.zeros_like(self.source)

    def chunk(self, number: int, memory: Memory, transfer_id: str = "t") -> KVChunk:
        row = memory[number]
        return KVChunk(
            transfer_id, (Segment(row.ctypes.data, BYTES),), KVCoordinates(layers=(number, number + 1))
        )


def run(case: Case, **options: Any) -> None:
    async def both() -> None:
        ends = Ends(**options)
        async with ends.prefill as prefill, ends.decode as decode:
            assert prefill is ends.prefill and decode is ends.decode
            prefill.register_memory([Segment(ends.source.ctypes.data, ends.source.nbytes)])
            decode.register_memory([Segment(ends.target.ctypes.data, ends.target.nbytes)])
            await case(ends)
            for engine in (prefill, decode):
                while any(engine.counters()[held] for held in ("offers", "subscriptions", "windows")):
                    await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(both(), 30))


@pytest.mark.parametrize("first", ["send", "recv"])
def test_a_chunk_moves_whichever_side_begins(first: str) -> None:
    async def case(ends: Ends) -> None:
        send = ends.prefill.send_kv_chunk(ends.chunk(1, ends.source), ends.decode.spec)
        recv = ends.decode.recv_kv_chunk(ends.chunk(1, ends.target), ends.prefill.spec)
        order = [send, recv] if first == "send" else [recv, send]
        tasks = []
        for step in order:
            tasks.append(asyncio.create_task(step))
            await asyncio.sleep(0.05)
        for stats in await asyncio.gather(*tasks):
            assert (stats.nbytes, stats.backend) == (BYTES, "tcp")
            assert 0 <= stats.wait_s < 20 and 0 < stats.transfer_s < 20
            assert stats.gbytes_per_s == pytest.approx(BYTES / stats.transfer_s / 1e9)
        assert np.array_equal(ends.source[1], ends.target[1]) and not ends.target[2].any()

    run(case)


def test_a_chunk_is_only_for_whom_it_was_sent_to() -> None:
    async def case(ends: Ends) -> None:
        other = DeviceSpec(engine_id="another")
        send = asyncio.create_task(ends.prefill.send_kv_chunk(ends.chunk(1, ends.source), other))
        with pytest.raises(TransferError) as caught:
            await ends.decode.recv_kv_chunk(ends.chunk(1, ends.target), ends.prefill.spec, deadline_s=5.0)
        assert caught.value.failure is not None and str(caught.value) == caught.value.args[0]
        with pytest.raises(TransferError):
            await send
        assert not ends.target.any()

    run(case, lease_s=0.3)


def test_what_nobody_fetches_or_sends_ends_in_time() -> None:
    async def case(ends: Ends) -> None:
        with pytest.raises(TransferError, match="lease"):
            await ends.prefill.send_kv_chunk(ends.chunk(1, ends.source), ends.decode.spec)
        with pytest.raises(TransferError, match=r"deadline|in time"):
            await ends.decode.recv_kv_chunk(ends.chunk(2, ends.target), ends.prefill.spec, deadline_s=0.1)
        with pytest.raises(TransferError, match=r"never|no session|nobody"):
            await ends.decode.recv_kv_chunk(ends.chunk(1, ends.target), DeviceSpec(), deadline_s=5.0)

    run(case, lease_s=0.3)


@pytest.mark.parametrize("after_s", [0.0, 0.05])
def test_a_cancelled_receive_writes_nothing_any_more(after_s: float) -> None:
    async def case(ends: Ends) -> None:
        receive = asyncio.create_task(
            ends.decode.recv_kv_chunk(ends.chunk(1, ends.target), ends.prefill.spec, deadline_s=20.0)
        )
        await asyncio.sleep(after_s)
        receive.cancel()
        with pytest.raises(asyncio.CancelledError):
            await receive
        assert ends.decode.counters()["subscriptions"] == 0
        # What follows over the same session comes after the cancellation; before, prefill would say that it sent.
        await asyncio.gather(
            ends.decode.recv_kv_chunk(ends.chunk(2, ends.target), ends.prefill.spec),
            ends.prefill.send_kv_chunk(ends.chunk(2, ends.source), ends.decode.spec),
        )
        with pytest.raises(TransferError):
            await ends.prefill.send_kv_chunk(ends.chunk(1, ends.source), ends.decode.spec)
        assert not np.delete(ends.target, 2, axis=0).any()

    run(case, lease_s=0.3)


def test_a_receive_that_is_cancelled_before_it_began_writes_nothing() -> None:
    async def case(ends: Ends) -> None:
        loop = ends.decode._core._loop
        loop.submit(time.sleep, 0.2)  # the control thread has other things to do
        receive = asyncio.create_task(
            ends.decode.recv_kv_chunk(ends.chunk(1, ends.target), ends.prefill.spec, deadline_s=20.0)
        )
        await asyncio.sleep(0.05)
        receive.cancel()
        with pytest.raises(asyncio.CancelledError):
            await receive
        assert ends.decode.counters()["subscriptions"] == 0

    run(case)


def test_a_cancelled_send_can_be_fetched_no_more() -> None:
    async def case(ends: Ends) -> None:
        send = asyncio.create_task(ends.prefill.send_kv_chunk(ends.chunk(1, ends.source), ends.decode.spec))
        await asyncio.sleep(0.05)
        send.cancel()
        with pytest.raises(asyncio.CancelledError):
            await send
        with pytest.raises(TransferError):
            await ends.decode.recv_kv_chunk(ends.chunk(1, ends.target), ends.prefill.spec, deadline_s=0.2)
        assert not ends.target.any()

    run(case, lease_s=30.0)


def test_a_pipeline_moves_all_of_them() -> None:
    async def case(ends: Ends) -> None:
        to = TransferPlan(peer=ends.decode.spec, prefetch_depth=3)
        here = TransferPlan(peer=ends.prefill.spec, direction="recv", prefetch_depth=2, deadline_s=10.0)
        sent, received = await asyncio.gather(
            ends.prefill.stream_pipeline([ends.chunk(i, ends.source) for i in range(8)], to),
            ends.decode.stream_pipeline([ends.chunk(i, ends.target) for i in range(8)], here),
        )
        assert ends.chunk(0, ends.source).nbytes == BYTES
        for report in (sent, received):
            assert report.nbytes == 8 * BYTES and len(report.stats) == 8
        assert np.array_equal(ends.source, ends.target)

    run(case)


def test_a_pipeline_stops_at_the_first_that_fails() -> None:
    async def case(ends: Ends) -> None:
        here = TransferPlan(peer=ends.prefill.spec, direction="recv", prefetch_depth=1, deadline_s=0.2)
        begun = asyncio.get_running_loop().time()
        with pytest.raises(TransferError, match="t/0-1"):
            await ends.decode.stream_pipeline([ends.chunk(i, ends.target) for i in range(8)], here)
        assert asyncio.get_running_loop().time() - begun < 1.4, "it tried one, or two"
        there = TransferPlan(peer=ends.decode.spec, prefetch_depth=1, deadline_s=0.1)
        with pytest.raises(TransferError, match=r"deadline of 0\.1 s passed"):
            await ends.prefill.stream_pipeline([ends.chunk(0, ends.source, "u")], there)

    run(case, lease_s=30.0)


def test_a_chunk_without_memory_is_refused() -> None:
    async def case(ends: Ends) -> None:
        empty = KVChunk("t", ())
        for step in (ends.prefill.send_kv_chunk, ends.decode.recv_kv_chunk):
            with pytest.raises(ValueError, match="payload of chunk t/"):
                await step(empty, DeviceSpec())

    run(case)
