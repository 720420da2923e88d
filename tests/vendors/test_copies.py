# SPDX-License-Identifier: Apache-2.0
"""Asynchronous copies, events and faults, on the emulators. Held engines stand for slow ones: no timing."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from sage_kv_connector.devices.runtime import (
    DeviceError,
    DeviceLost,
    DmaFailed,
)
from tests.vendors.rig import D2D, D2H, H2D, Rig

N = 1 << 16


def test_there_and_back(rig: Rig) -> None:
    data = rig.random(N)
    first = rig.upload(data)
    second = rig.runtime.alloc(0, N)
    stream = rig.runtime.stream_create(0)
    rig.runtime.copy_async(0, second, first, N, D2D, stream)
    rig.runtime.stream_synchronize(0, stream)
    assert (rig.download(second, N) == data).all()


def test_a_copy_is_under_way_until_its_event(rig: Rig) -> None:
    data, device = rig.random(N), rig.runtime.alloc(0, N)
    stream = rig.runtime.stream_create(0)
    rig.control.hold("h2d")
    rig.runtime.copy_async(0, device, data.ctypes.data, N, H2D, stream)
    event = rig.marked(stream)
    assert not rig.runtime.event_query(0, event)
    rig.control.release()
    rig.runtime.event_synchronize(0, event)
    assert rig.runtime.event_query(0, event)
    assert (rig.download(device, N) == data).all()


def test_directions_and_streams_run_beside_one_another(rig: Rig) -> None:
    device = rig.upload(rig.random(N))
    up, down = rig.runtime.stream_create(0), rig.runtime.stream_create(0)
    rig.control.hold("h2d")
    target = rig.runtime.alloc(0, N)
    rig.runtime.copy_async(0, target, rig.random(N, 1).ctypes.data, N, H2D, up)
    waiting = rig.marked(up)
    back = rig.pinned(N)
    rig.runtime.copy_async(0, back.ctypes.data, device, N, D2H, down)
    rig.runtime.event_synchronize(0, rig.marked(down))  # does not wait for the other
    assert not rig.runtime.event_query(0, waiting)
    rig.control.release()
    rig.runtime.event_synchronize(0, waiting)


def test_a_stream_keeps_its_order(rig: Rig) -> None:
    device, stream = rig.runtime.alloc(0, N), rig.runtime.stream_create(0)
    sources = [rig.random(N, seed) for seed in range(20)]
    results = [rig.pinned(N) for _ in sources]
    for source, result in zip(sources, results, strict=True):
        rig.runtime.copy_async(0, device, source.ctypes.data, N, H2D, stream)
        rig.runtime.copy_async(0, result.ctypes.data, device, N, D2H, stream)
    rig.runtime.stream_synchronize(0, stream)
    for source, result in zip(sources, results, strict=True):
        assert (source == result).all()


def test_a_stream_waits_for_another_ones_event(rig: Rig) -> None:
    data, back, device = rig.random(N), rig.pinned(N), rig.runtime.alloc(0, N)
    producer, consumer = rig.runtime.stream_create(0), rig.runtime.stream_create(0)
    rig.control.hold("h2d")
    rig.runtime.copy_async(0, device, data.ctypes.data, N, H2D, producer)
    rig.runtime.stream_wait_event(0, consumer, rig.marked(producer))
    rig.runtime.copy_async(0, back.ctypes.data, device, N, D2H, consumer)
    done = rig.marked(consumer)
    assert not rig.runtime.event_query(0, done)
    rig.control.release()
    rig.runtime.event_synchronize(0, done)
    assert (back == data).all()


def test_an_event_counts_from_its_last_record(rig: Rig) -> None:
    data, device, stream = rig.random(N), rig.runtime.alloc(0, N), rig.runtime.stream_create(0)
    event = rig.marked(stream)
    rig.runtime.event_synchronize(0, event)
    rig.control.hold("h2d")
    rig.runtime.copy_async(0, device, data.ctypes.data, N, H2D, stream)
    rig.runtime.event_record(0, event, stream)
    assert not rig.runtime.event_query(0, event)
    rig.control.release()
    rig.runtime.event_synchronize(0, event)
    rig.runtime.event_destroy(0, event)


def test_waiting_lets_other_threads_run(rig: Rig) -> None:
    data, device, stream = rig.random(N), rig.runtime.alloc(0, N), rig.runtime.stream_create(0)
    rig.control.hold("h2d")
    rig.runtime.copy_async(0, device, data.ctypes.data, N, H2D, stream)
    event = rig.marked(stream)
    waiter = threading.Thread(
        target=rig.runtime.event_synchronize, args=(0, event)
    )  # which sets its own device
    waiter.start()
    rig.control.release()  # would never be reached with the GIL held
    waiter.join(30)
    assert not waiter.is_alive()


def test_batches(rig: Rig) -> None:
    data, device, stream = rig.random(N), rig.runtime.alloc(0, N), rig.runtime.stream_create(0)
    order = np.random.default_rng(0).permutation(N // 1024)
    rows = [(device + i * 1024, data.ctypes.data + int(k) * 1024, 1024) for i, k in enumerate(order)]
    rig.runtime.copy_batch_async(0, np.array(rows, np.uint64), H2D, stream)
    back = rig.pinned(N)
    rows = [(back.ctypes.data + int(k) * 1024, device + i * 1024, 1024) for i, k in enumerate(order)]
    rig.runtime.copy_batch_async(0, np.array(rows, np.uint64), D2H, stream)
    rig.runtime.copy_batch_async(0, np.empty((0, 3), np.uint64), D2H, stream)
    rig.runtime.stream_synchronize(0, stream)
    assert (back == data).all()


def test_pageable_memory_is_copied_at_once(rig: Rig) -> None:
    data, device = np.full(N, 3, np.uint8), rig.runtime.alloc(0, N)
    stream = rig.runtime.stream_create(0)
    rig.runtime.copy_async(0, device, data.ctypes.data, N, H2D, stream)
    data[:] = 4
    assert (rig.download(device, N) == 3).all()


def test_what_dma_refuses(vendor: str) -> None:
    rig = Rig(vendor, dma_alignment_bytes=64, max_transfer_bytes=8192)
    host, device, stream = rig.pinned(N), rig.runtime.alloc(0, N), rig.runtime.stream_create(0)
    at = host.ctypes.data

    def copy(*arguments: int) -> None:
        destination, source, nbytes = arguments
        rig.runtime.copy_async(0, destination, source, nbytes, H2D, stream)

    for misaligned in ((device + 32, at, 64), (device, at + 1, 64), (device, at, 65)):
        with pytest.raises(rig.misaligned):
            copy(*misaligned)
    for refused in (
        (device, at, 8192 + 64),  # longer than one transfer
        (device + N - 64, at, 128),  # behind the allocation
        (device, at + N - 64, 128),  # behind the pinned memory
        (at, device, 64),  # the other direction
        (device, device + 64, 64),  # no host memory in it
        (device, at, 0),
    ):
        with pytest.raises(DeviceError):
            copy(*refused)
    copy(device, at, 8192)
    rig.runtime.stream_synchronize(0, stream)  # refused calls left nothing behind


def test_a_dma_error_shows_at_the_event(rig: Rig) -> None:
    data, device = rig.random(N), rig.runtime.alloc(0, N)
    stream, other = rig.runtime.stream_create(0), rig.runtime.stream_create(0)
    rig.control.set(dma_error_after_copies=1)
    rig.control.hold("h2d")
    for _ in range(2):
        rig.runtime.copy_async(0, device, data.ctypes.data, N, H2D, stream)
    event = rig.marked(stream)
    rig.control.release()
    with pytest.raises(DmaFailed) as caught:
        rig.runtime.event_synchronize(0, event)
    assert caught.value.name in str(caught.value) and "known here" not in caught.value.name
    with pytest.raises(DmaFailed):
        rig.runtime.event_query(0, event)
    with pytest.raises(DmaFailed):
        rig.runtime.stream_synchronize(0, stream)
    with pytest.raises(DmaFailed):  # the stream is done for
        rig.runtime.copy_async(0, device, data.ctypes.data, N, H2D, stream)
    rig.runtime.stream_destroy(0, stream)
    rig.runtime.copy_async(0, device, data.ctypes.data, N, H2D, other)
    rig.runtime.stream_synchronize(0, other)
    rig.runtime.free(0, device)


def test_who_waits_for_a_failed_copy_fails_too(rig: Rig) -> None:
    data, device = rig.random(N), rig.runtime.alloc(0, N)
    producer, consumer = rig.runtime.stream_create(0), rig.runtime.stream_create(0)
    rig.control.set(dma_error_after_copies=0)
    rig.control.hold("h2d")
    rig.runtime.copy_async(0, device, data.ctypes.data, N, H2D, producer)
    rig.runtime.stream_wait_event(0, consumer, rig.marked(producer))
    rig.runtime.copy_async(0, data.ctypes.data, device, N, D2H, consumer)
    event = rig.marked(consumer)
    rig.control.release()
    with pytest.raises(DmaFailed):
        rig.runtime.event_synchronize(0, event)


def test_a_lost_device_takes_what_it_had(rig: Rig) -> None:
    data, device, stream = rig.random(N), rig.runtime.alloc(0, N), rig.runtime.stream_create(0)
    registered = np.zeros(N, np.uint8)
    if rig.runtime.features.host_register:
        rig.runtime.host_register(0, registered.ctypes.data, N)
    rig.control.set(device_lost_after_copies=1)
    event = rig.runtime.event_create(0)
    rig.control.hold("h2d")
    for _ in range(3):
        rig.runtime.copy_async(0, device, data.ctypes.data, N, H2D, stream)
    rig.runtime.event_record(0, event, stream)
    rig.control.release()
    with pytest.raises(DeviceLost):
        rig.runtime.event_synchronize(0, event)
    for call in (
        lambda: rig.runtime.event_query(0, event),
        lambda: rig.runtime.stream_synchronize(0, stream),
        lambda: rig.runtime.alloc(0, 4096),
        lambda: rig.runtime.copy_async(0, device, data.ctypes.data, N, H2D, stream),
        lambda: rig.runtime.stream_create(0),
    ):
        with pytest.raises(DeviceLost):
            call()
    rig.runtime.event_destroy(0, event)
    rig.runtime.stream_destroy(0, stream)
    rig.runtime.free(0, device)
    rig.runtime.host_free(0, data.ctypes.data)
    if rig.runtime.features.host_register:
        rig.runtime.host_unregister(0, registered.ctypes.data)
    rig.control.set(device_lost_after_copies=None)
    survivor = rig.pinned(N, 1)
    survivor[:] = 9
    assert (rig.download(rig.upload(survivor, 1), N, 1) == 9).all()


def test_between_devices(rig: Rig) -> None:
    data = rig.random(N)
    source, target = rig.upload(data, 0), rig.runtime.alloc(1, N)
    assert rig.runtime.can_access_peer(1, 0)
    for _ in range(2):
        rig.runtime.enable_peer_access(1, 0)
    stream = rig.runtime.stream_create(1)
    rig.runtime.copy_peer_async(target, 1, source, 0, N, stream)
    rig.runtime.stream_synchronize(1, stream)
    assert (rig.download(target, N, 1) == data).all()


def test_a_peer_copy_under_way(rig: Rig) -> None:
    if not rig.runtime.features.asynchronous_peer_copies:
        pytest.skip("peer copies of this runtime block")
    source, target = rig.upload(rig.random(N), 0), rig.runtime.alloc(1, N)
    rig.runtime.enable_peer_access(1, 0)
    stream = rig.runtime.stream_create(1)
    rig.control.hold("peer")
    rig.runtime.copy_peer_async(target, 1, source, 0, N, stream)
    event = rig.marked(stream, 1)
    assert not rig.runtime.event_query(1, event)
    rig.control.release()
    rig.runtime.event_synchronize(1, event)


def test_devices_that_do_not_reach_each_other(vendor: str) -> None:
    rig = Rig(vendor, peer_access=((False, True), (False, False)))  # 0 reaches 1, not the other way
    data = rig.random(N)
    source, target = rig.upload(data, 0), rig.runtime.alloc(1, N)
    stream = rig.runtime.stream_create(1)
    if rig.runtime.features.asks_peers:
        assert rig.runtime.can_access_peer(0, 1) and not rig.runtime.can_access_peer(1, 0)
        with pytest.raises(DeviceError):
            rig.runtime.enable_peer_access(1, 0)
    if rig.runtime.features.stages_peer_copies:
        rig.runtime.copy_peer_async(target, 1, source, 0, N, stream)
        rig.runtime.stream_synchronize(1, stream)
        assert (rig.download(target, N, 1) == data).all()
    else:
        with pytest.raises(DeviceError):
            rig.runtime.copy_peer_async(target, 1, source, 0, N, stream)


def test_a_stream_belongs_to_its_device(rig: Rig) -> None:
    data, device, stream = rig.random(N), rig.runtime.alloc(1, N), rig.runtime.stream_create(0)
    with pytest.raises(DeviceError):
        rig.runtime.copy_async(1, device, data.ctypes.data, N, H2D, stream)
    with pytest.raises(DeviceError):
        rig.runtime.stream_create(2)


def test_the_machine_counts_what_is_asked_of_it(rig: Rig) -> None:
    data, device = rig.random(N), rig.runtime.alloc(0, N)
    stream = rig.runtime.stream_create(0)
    before = rig.control.counts()
    table = np.array([[device + 64 * i, data.ctypes.data + 64 * i, 64] for i in range(10)], np.uint64)
    rig.runtime.copy_batch_async(0, table, H2D, stream)
    rig.runtime.copy_async(0, data.ctypes.data, device, 128, D2H, stream)
    rig.runtime.stream_synchronize(0, stream)
    asked = {
        way: tuple(now - then for now, then in zip(counts, before[way], strict=True))
        for way, counts in rig.control.counts().items()
    }
    calls = 1 if rig.runtime.features.batched_copies else 10
    assert asked == {"h2d": (calls, 10, 640), "d2h": (1, 1, 128), "d2d": (0, 0, 0), "peer": (0, 0, 0)}
