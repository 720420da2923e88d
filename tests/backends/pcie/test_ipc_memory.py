# SPDX-License-Identifier: Apache-2.0
"""Which allocations a range of device memory lies in, and those that no peer can open."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest

from sage_kv_connector.backends.pcie.ipc_memory import IpcMemory
from sage_kv_connector.devices.runtime import DeviceError, DeviceMemory, DeviceRuntime
from sage_kv_connector.vendors import vendor_module
from tests.vendors.rig import Rig, emulator_of

SIZE = 64 << 10
LOW, HIGH = 1 << 30, (1 << 30) + SIZE


class TwoNeighbours:
    """A runtime with two allocations side by side, as a driver may place them."""

    vendor = "test"

    def ipc_process_id(self, device: int) -> int:
        return 7

    def allocation_of(self, device: int, address: int, nbytes: int) -> tuple[int, int]:
        base = LOW if address < HIGH else HIGH
        if address + nbytes > base + SIZE:
            raise ValueError("not inside one allocation")
        return base, SIZE

    def ipc_export(self, device: int, base: int, nbytes: int, importer_pid: int) -> bytes:
        return f"{base - LOW} {nbytes} {importer_pid}".encode()


def test_a_range_over_two_allocations_is_exported_as_two() -> None:
    memory = IpcMemory(DeviceMemory(cast(DeviceRuntime, TwoNeighbours()), 0))
    memory.register(LOW + 256, 2 * SIZE - 512)
    descriptors = np.array([[LOW + 512, 0, 64], [HIGH, 64, 128]], dtype=np.uint64)
    handles, sizes, table = memory.export(descriptors, 9)
    assert handles == (f"0 {SIZE} 9".encode(), f"{SIZE} {SIZE} 9".encode()) and sizes == (SIZE, SIZE)
    rows = np.frombuffer(table, dtype="<u8").reshape(-1, 4).tolist()
    assert rows == [[0, 512, 0, 64], [1, 0, 64, 128]]
    assert memory.covers(np.array([[LOW + 256, 16], [HIGH + SIZE - 272, 16]], dtype=np.uint64))
    assert not memory.covers(np.array([[LOW, 16]], dtype=np.uint64))
    with pytest.raises(ValueError, match="is not registered memory"):
        memory.export(np.array([[LOW, 0, 16]], dtype=np.uint64), 9)


def test_memory_without_a_handle_is_told_once_and_no_peer_is_let_in(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rig = Rig("nvidia", memory_bytes=64 << 20)
    memory = IpcMemory(DeviceMemory(rig.runtime, 0))
    memory.register(rig.runtime.alloc(0, 4096), 4096)
    assert memory.probe(1)
    rig.control.set(virtual_memory=True)
    try:
        for _ in range(2):
            memory.register(rig.runtime.alloc(0, 4096), 4096)
    finally:
        rig.control.set(virtual_memory=False)
    with pytest.raises(DeviceError, match="cuIpcGetMemHandle failed with 1"):
        memory.probe(1)
    assert caplog.text.count("is staged in host memory") == 1 and "CUDA_ERROR_INVALID_VALUE" in caplog.text
    memory.close()


def test_memory_of_an_allocator_that_the_runtime_does_not_know_is_staged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An engine's own: XPU's library does not tell where its allocations begin."""
    library, module = emulator_of("kunlunxin"), vendor_module("kunlunxin", "runtime")
    ours, engine = module.create(library), module.create(library)
    address = engine.alloc(0, SIZE)
    memory = IpcMemory(DeviceMemory(ours, 0))
    memory.register(address, SIZE)
    assert memory.covers(np.array([[address, SIZE]], dtype=np.uint64))
    with pytest.raises(DeviceError, match="does not tell where others' allocations begin"):
        memory.probe(1)
    assert caplog.text.count("is staged in host memory") == 1
    memory.close()
