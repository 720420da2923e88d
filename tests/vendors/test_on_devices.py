# SPDX-License-Identifier: Apache-2.0
"""The same calls on real devices, for whoever has some; skipped where a vendor's library or device is missing."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from sage_kv_connector.bench.device_golden import golden_differences
from sage_kv_connector.devices.runtime import (
    CopyKind,
    DeviceError,
    DeviceOutOfMemory,
    DeviceRuntime,
    RuntimeUnavailable,
)
from sage_kv_connector.kernels.registry import BY_ADDRESS
from sage_kv_connector.vendors import open_runtime
from tests.vendors.kernels import Adder, argument, can_compile

N = 1 << 20


@pytest.fixture
def device(vendor: str) -> DeviceRuntime:
    try:
        runtime = open_runtime(vendor)
        if runtime.device_count() == 0:
            pytest.skip(f"{vendor}: no device")
    except (RuntimeUnavailable, DeviceError) as error:
        pytest.skip(str(error))
    assert not runtime.emulated
    return runtime


def test_round_trip(device: DeviceRuntime) -> None:
    host = device.host_alloc(0, N)
    view = np.ctypeslib.as_array((ctypes.c_uint8 * N).from_address(host))
    view[:] = data = np.random.default_rng(0).integers(0, 256, N, dtype=np.uint8)
    memory, stream, event = device.alloc(0, N), device.stream_create(0), device.event_create(0)
    rows = np.array([(memory + i, host + i, 4096) for i in range(0, N, 4096)], np.uint64)
    device.copy_batch_async(0, rows, CopyKind.HOST_TO_DEVICE, stream)
    device.event_record(0, event, stream)
    device.event_synchronize(0, event)
    assert device.event_query(0, event)
    view[:] = 0
    device.copy_async(0, host, memory, N, CopyKind.DEVICE_TO_HOST, stream)
    device.stream_synchronize(0, stream)
    assert (view == data).all()
    assert device.allocation_of(0, memory + 5, 5)[0] == memory
    device.event_destroy(0, event)
    device.stream_destroy(0, stream)
    device.free(0, memory)
    device.host_free(0, host)


def test_registered_memory_and_a_stream_that_waits(device: DeviceRuntime) -> None:
    data, back = np.arange(N, dtype=np.uint32), np.zeros(N, np.uint32)
    if device.features.host_register:
        for array in (data, back):
            device.host_register(0, array.ctypes.data, array.nbytes)
    memory = device.alloc(0, data.nbytes)
    first, second, event = device.stream_create(0), device.stream_create(0), device.event_create(0)
    device.copy_async(0, memory, data.ctypes.data, data.nbytes, CopyKind.HOST_TO_DEVICE, first)
    device.event_record(0, event, first)
    device.stream_wait_event(0, second, event)
    device.copy_async(0, back.ctypes.data, memory, data.nbytes, CopyKind.DEVICE_TO_HOST, second)
    device.stream_synchronize(0, second)
    assert (back == data).all()
    if device.features.host_register:
        for array in (data, back):
            device.host_unregister(0, array.ctypes.data)


def test_a_kernel_between_copies(device: DeviceRuntime) -> None:
    """Where it can, it waits for a pinned word, so nothing that is queued behind it has come yet."""
    if not device.features.kernels:
        pytest.skip(f"no kernels are launched through {device.api}")
    if not can_compile(device.architecture(0)):
        pytest.skip(f"no compiler for {device.architecture(0)}")
    waits = device.features.kernels_read_pinned
    gate, host = device.host_alloc(0, 4), device.host_alloc(0, 2 * N)
    awaited = np.ctypeslib.as_array((ctypes.c_uint32 * 1).from_address(gate))
    data, back = np.ctypeslib.as_array((ctypes.c_uint32 * (N // 2)).from_address(host)).reshape(2, -1)
    awaited[:], data[:], back[:] = 0, np.arange(N // 4), 0
    memory, stream, event = device.alloc(0, N), device.stream_create(0), device.event_create(0)
    adder = Adder(device)
    device.copy_async(0, memory, data.ctypes.data, N, CopyKind.HOST_TO_DEVICE, stream)
    adder.launch(argument(memory, N // 4, 7, gate if waits else 0), stream)
    device.copy_async(0, back.ctypes.data, memory, N, CopyKind.DEVICE_TO_HOST, stream)
    device.event_record(0, event, stream)
    if waits:
        assert not device.event_query(0, event) and not back.any()
    awaited[:] = 1
    device.event_synchronize(0, event)
    assert (back == data + 7).all()
    for image, name in ((b"no image" + bytes(4096), "add_words"), (adder.module, "subtract_words")):
        with pytest.raises(DeviceError):
            device.load_function(0, image, name)


def test_out_of_memory(device: DeviceRuntime) -> None:
    with pytest.raises(DeviceOutOfMemory):
        device.alloc(0, 1 << 46)
    device.free(0, device.alloc(0, N))


def test_golden_vectors(device: DeviceRuntime) -> None:
    if device.vendor not in BY_ADDRESS:
        pytest.skip(f"{device.vendor}: no kernels to launch")
    *wrong, _ = golden_differences(device, 0, ["bf16", "fp8_e4m3"])
    assert wrong == []
