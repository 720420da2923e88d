# SPDX-License-Identifier: Apache-2.0
"""What streaming a prefill costs the engine's own stream, and how long after its last layer decode has the KV.

The engine is simulated: a stream of the device computes layers (copies inside the device that take as long as a layer
of a model), and its thread records an event behind each. Every other pass is one without a transfer.
"""

from __future__ import annotations

import queue
import statistics
import time
from functools import partial
from typing import Any

import numpy as np

from sage_kv_connector.bench.device_cache import CacheShape, DeviceCache
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.devices.runtime import CopyKind
from sage_kv_connector.engine import PagedSource, Step
from sage_kv_connector.integrations.common.compute_events import ComputeEvents

LAYER_BYTES = 64 << 20


class _Event:
    def __init__(self, cache: DeviceCache, stream: int) -> None:
        self._runtime, self._stream = cache.runtime, stream
        self._event = cache.runtime.event_create(0)

    def record(self) -> None:
        self._runtime.event_record(0, self._event, self._stream)

    def synchronize(self) -> None:
        self._runtime.event_synchronize(0, self._event)


def _layer_is_final(prefill: DeviceCache, name: str, step: Step, layer: int) -> None:
    step.layer(0, layer)
    prefill.core.advanced(name)


def _failed(why: str) -> None:
    raise RuntimeError(why)  # said in the log; the hand-over ends by its own deadline


def bench_stream(
    vendor: str,
    shape: CacheShape,
    target_dtype: str,
    passes: int,
    *,
    emulated: bool,
    layer_bytes: int = LAYER_BYTES,
) -> dict[str, Any]:
    """Milliseconds of a pass with and without a transfer, of the engine's thread, and from its end to decode's.

    Two engines of one process on device 0, staged over shm; decode's cache is on it too.
    """
    config = {"backend": "shm", "host": "127.0.0.1", "target_dtype": target_dtype}
    prefill = DeviceCache(vendor, shape, config, "prefill", emulated=emulated)
    decode = DeviceCache(vendor, shape, config, "decode", emulated=emulated)
    runtime = prefill.runtime
    stream = runtime.stream_create(0)
    scratch = [runtime.alloc(0, layer_bytes) for _ in range(2)]
    computed = ComputeEvents(lambda: _Event(prefill, stream))
    released: queue.Queue[Outcome] = queue.Queue()
    alone, served, thread, tail = [], [], [], []
    try:
        for number in range(2 * passes + 2):
            transfers = number % 2 == 1
            source, step, outcomes = PagedSource(prefill.view), Step(), queue.Queue[Outcome]()
            name = f"stream-{number}"
            if transfers:
                source.set_pages(0, prefill.table)
                pages = (len(prefill.table),)
                source.end(pages)
                step.add(source.tables, pages)
                prefill.core.offer(name, source, released.put)
                peer = PeerAddress(prefill.core.engine_id, 0, prefill.core.addresses)
                decode.begin_fetch(peer, name, outcomes)
                while not prefill.core.is_streaming(name):
                    time.sleep(0.001)
            runtime.stream_synchronize(0, stream)
            begun = time.perf_counter()
            for layer in range(shape.layers):
                runtime.copy_async(0, scratch[0], scratch[1], layer_bytes, CopyKind.DEVICE_TO_DEVICE, stream)
                if transfers:
                    computed.behind(partial(_layer_is_final, prefill, name, step, layer), _failed)
            on_thread = time.perf_counter() - begun
            runtime.stream_synchronize(0, stream)
            passed = time.perf_counter()
            if transfers:
                prefill.core.finish(name)
                outcome = outcomes.get(timeout=60)
                if not outcome.ok:
                    raise RuntimeError(outcome.error)
                if number > 1:
                    served.append(passed - begun)
                    thread.append(on_thread)
                    tail.append(time.perf_counter() - passed)
            elif number > 1:
                alone.append(passed - begun)
    finally:
        computed.close()
        prefill.core.close()
        decode.core.close()
    ms = {name: 1e3 * statistics.median(each) for name, each in (
        ("pass_alone_ms", alone), ("pass_served_ms", served), ("engine_thread_ms", thread),
        ("after_last_layer_ms", tail),
    )}  # fmt: skip
    return {
        "runtime": runtime.api, "emulated": emulated, "target_dtype": target_dtype, "layers": shape.layers,
        "kv_bytes": shape.layers * shape.layer_bytes, **ms, "delay": ms["pass_served_ms"] / ms["pass_alone_ms"] - 1,
        "median_of": int(np.size(served)),
    }  # fmt: skip
