# SPDX-License-Identifier: Apache-2.0
"""Device memory, pinned memory and other processes, on the emulators."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from sage_kv_connector.devices.runtime import (
    DeviceError,
    DeviceOutOfMemory,
    UnsupportedByRuntime,
)
from tests.vendors.rig import D2H, H2D, Rig

IMPORTER = """
import sys, numpy as np
from tests.vendors.rig import Rig
vendor = sys.argv[1]
rig = Rig(vendor, memory_bytes=1 << 20)
print(rig.runtime.ipc_process_id(0), flush=True)
handle = bytes.fromhex(input())
base = rig.runtime.ipc_import(0, handle)
seen = rig.download(base, 8192)
print(int(seen.sum()), flush=True)
mine = rig.pinned(8192); mine[:] = 7
stream = rig.runtime.stream_create(0)
rig.runtime.copy_async(0, base + 4096, mine.ctypes.data, 4096, 1, stream)
rig.runtime.stream_synchronize(0, stream)
print("written", flush=True)
input()
rig.runtime.ipc_close(0, base)
print("closed", flush=True)
"""


def test_it_says_that_it_is_emulated(rig: Rig, vendor: str) -> None:
    assert rig.runtime.emulated
    assert "emulated" in rig.runtime.api
    assert rig.runtime.vendor == vendor
    assert rig.runtime.device_count() == 2


def test_memory_is_counted_and_comes_back(rig: Rig) -> None:
    for _ in range(3):  # a leak would run out
        address = rig.runtime.alloc(0, 1 << 20)
        with pytest.raises(DeviceOutOfMemory):
            rig.runtime.alloc(0, 4096)
        rig.runtime.free(1, rig.runtime.alloc(1, 1 << 20))  # the other device has its own
        rig.runtime.free(0, address)
    if not rig.runtime.features.memory_info:
        with pytest.raises(UnsupportedByRuntime):
            rig.runtime.memory_info(0)
        return
    assert rig.runtime.memory_info(0) == (1 << 20, 1 << 20)
    assert rig.runtime.device_info(0).memory_bytes == 1 << 20


def test_out_of_memory_can_be_asked_for(vendor: str) -> None:
    rig = Rig(vendor, memory_bytes=1 << 20, out_of_memory_after_bytes=8192)
    address = rig.runtime.alloc(0, 8192)
    with pytest.raises(DeviceOutOfMemory) as caught:
        rig.runtime.alloc(0, 1)
    assert caught.value.vendor == vendor
    assert caught.value.name in str(caught.value)
    assert "emulated" in str(caught.value)
    rig.runtime.free(0, address)


def test_freeing_what_was_not_allocated(rig: Rig) -> None:
    address = rig.runtime.alloc(0, 4096)
    rig.runtime.free(0, address)
    with pytest.raises(DeviceError):
        rig.runtime.free(0, address)


def test_allocation_of_an_inner_range(rig: Rig) -> None:
    address = rig.runtime.alloc(0, 10000)
    assert rig.runtime.allocation_of(0, address + 5000, 5000) == (address, 10000)
    with pytest.raises(ValueError, match="not inside one allocation"):
        rig.runtime.allocation_of(0, address + 5000, 5001)
    with pytest.raises((DeviceError, ValueError)):
        rig.runtime.allocation_of(0, rig.pinned(4096).ctypes.data, 1)


def test_existing_memory_is_pinned(vendor: str) -> None:
    rig = Rig(vendor, pinned_only=True)
    memory = np.arange(8192, dtype=np.uint8)
    address, device = memory.ctypes.data, rig.runtime.alloc(0, 8192)
    stream = rig.runtime.stream_create(0)
    with pytest.raises(DeviceError):
        rig.runtime.copy_async(0, device, address, 8192, H2D, stream)
    if not rig.runtime.features.host_register:
        with pytest.raises(UnsupportedByRuntime):
            rig.runtime.host_register(0, address, 8192)
        return
    rig.runtime.host_register(0, address, 8192)
    with pytest.raises(DeviceError):
        rig.runtime.host_register(0, address + 4096, 4096)
    rig.runtime.copy_async(0, device, address, 8192, H2D, stream)
    with pytest.raises(DeviceError):  # half of it is pinned
        rig.runtime.copy_async(0, device, address + 4096, 8192, H2D, stream)
    rig.runtime.stream_synchronize(0, stream)
    assert (rig.download(device, 8192) == memory).all()
    rig.runtime.host_unregister(0, address)
    with pytest.raises(DeviceError):
        rig.runtime.host_unregister(0, address)


def test_memory_in_flight_can_not_be_freed(rig: Rig) -> None:
    device, host = rig.runtime.alloc(0, 4096), rig.runtime.host_alloc(0, 4096)
    stream = rig.runtime.stream_create(0)
    rig.control.hold("d2h")
    rig.runtime.copy_async(0, host, device, 4096, D2H, stream)
    with pytest.raises(DeviceError):
        rig.runtime.free(0, device)
    with pytest.raises(DeviceError):
        rig.runtime.host_free(0, host)
    rig.control.release()
    rig.runtime.stream_synchronize(0, stream)
    rig.runtime.free(0, device)
    rig.runtime.host_free(0, host)


def test_the_host_can_not_touch_device_memory(vendor: str) -> None:
    code = (
        "import ctypes, sys; from tests.vendors.rig import Rig; rig = Rig(sys.argv[1]); "
        "address = rig.runtime.alloc(0, 4096); print('allocated', flush=True); ctypes.string_at(address, 1)"
    )
    done = subprocess.run([sys.executable, "-c", code, vendor], capture_output=True, text=True)
    assert done.stdout.strip() == "allocated"
    assert done.returncode == -signal.SIGSEGV


def test_another_process_reads_and_writes_it(rig: Rig, vendor: str) -> None:
    data = rig.random(8192)
    base = rig.upload(data)
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORTER, vendor], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdin is not None and process.stdout is not None
        handle = rig.runtime.ipc_export(0, base, 8192, int(process.stdout.readline()))
        assert rig.runtime.ipc_export(0, base, 8192, 1) == handle  # again, for another importer
        print(handle.hex(), file=process.stdin, flush=True)
        assert int(process.stdout.readline()) == int(data.sum())
        assert process.stdout.readline() == "written\n"
        after = rig.download(base, 8192)
        assert (after[:4096] == data[:4096]).all() and (after[4096:] == 7).all()
        with pytest.raises(DeviceError):
            rig.runtime.free(0, base)  # the importer has to close first
        print(file=process.stdin, flush=True)
        assert process.stdout.readline() == "closed\n"
        rig.runtime.free(0, base)
    finally:
        process.kill()
        process.communicate()


def test_a_dead_importer_does_not_keep_memory(rig: Rig, vendor: str) -> None:
    base = rig.upload(rig.random(8192))
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORTER, vendor], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    handle = rig.runtime.ipc_export(0, base, 8192, int(process.stdout.readline()))
    print(handle.hex(), file=process.stdin, flush=True)
    process.stdout.readline()
    process.kill()
    process.communicate()
    rig.runtime.free(0, base)


def test_handles_that_lead_nowhere(rig: Rig) -> None:
    base = rig.runtime.alloc(0, 4096)
    handle = rig.runtime.ipc_export(0, base, 4096, rig.runtime.ipc_process_id(0))
    with pytest.raises(ValueError, match=f"has {len(handle)} bytes, not {len(handle) - 1}"):
        rig.runtime.ipc_import(0, handle[:-1])
    with pytest.raises(DeviceError):
        rig.runtime.ipc_import(0, handle)  # one's own
    with pytest.raises(DeviceError):
        rig.runtime.ipc_import(0, bytes(len(handle)))
    with pytest.raises((DeviceError, ValueError)):
        rig.runtime.ipc_close(0, base)


def test_a_handle_of_freed_memory(rig: Rig, vendor: str) -> None:
    """Also when other memory took its place."""
    base = rig.upload(rig.random(8192))
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORTER, vendor],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    handle = rig.runtime.ipc_export(0, base, 8192, int(process.stdout.readline()))
    rig.runtime.free(0, base)
    rig.upload(rig.random(8192, 1))
    _, errors = process.communicate(handle.hex() + "\n")
    assert process.returncode == 1
    assert "DeviceError" in errors and "ipc_import" in errors


def test_no_ipc(vendor: str) -> None:
    rig = Rig(vendor, ipc=False)
    with pytest.raises(UnsupportedByRuntime):
        rig.runtime.ipc_export(0, rig.runtime.alloc(0, 4096), 4096, 1)


def test_two_machines_know_nothing_of_each_other(vendor: str) -> None:
    one, other = Rig(vendor, memory_bytes=1 << 20), Rig(vendor, memory_bytes=1 << 20, devices=1)
    address = one.runtime.alloc(0, 1 << 20)
    other.runtime.free(0, other.runtime.alloc(0, 1 << 20))
    with pytest.raises(DeviceError):
        other.runtime.free(0, address)
    assert (one.runtime.device_count(), other.runtime.device_count()) == (2, 1)


def device_memories() -> int:
    """Open in this process."""
    names = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{fd}")
    ]
    return sum("sage-emulator-device-memory" in name for name in names)


@pytest.mark.usefixtures("collected")
def test_an_emulated_machine_that_nobody_has_any_more_keeps_no_memory(vendor: str) -> None:
    before = device_memories()
    gone, stays = Rig(vendor, memory_bytes=1 << 20), Rig(vendor, memory_bytes=1 << 20)
    for _ in range(3):
        gone.upload(np.ones(4096, dtype=np.uint8))
    kept = stays.upload(np.full(4096, 9, dtype=np.uint8))
    assert device_memories() == before + 4
    del gone
    gc.collect()
    assert device_memories() == before + 1
    assert (stays.download(kept, 4096) == 9).all()
