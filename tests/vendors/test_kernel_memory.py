# SPDX-License-Identifier: Apache-2.0
"""Which memory kernels reach, and when, on the emulators."""

from __future__ import annotations

import signal
import subprocess
import sys

import numpy as np
import pytest

from sage_kv_connector.devices.runtime import DeviceError
from tests.vendors.kernels import Adder, argument, kernel_rig, wait, words_of
from tests.vendors.rig import Rig, expected

COUNT = 1024
N = 4 * COUNT

#: A process with a machine of its own; ``case`` is what it does.
PROCESS = """
import ctypes, sys
from tests.vendors.kernels import Adder, argument, words_of
from tests.vendors.rig import Rig
rig = Rig(sys.argv[1])
stream = rig.runtime.stream_create(0)
adder = Adder(rig.runtime)
"""


@pytest.fixture
def rig(vendor: str) -> Rig:
    return kernel_rig(vendor)


def command_of(vendor: str, case: str) -> list[str]:
    return [sys.executable, "-c", PROCESS + case, vendor]


def run(vendor: str, case: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command_of(vendor, case), capture_output=True, text=True, timeout=120)


def test_memory_that_a_queued_launch_names_can_not_be_freed(rig: Rig) -> None:
    device, unnamed, word = rig.runtime.alloc(0, N), rig.runtime.alloc(0, N), rig.pinned(4)
    stream = rig.runtime.stream_create(0)
    Adder(rig.runtime).launch(argument(device + 64, 1, 1, word.ctypes.data), stream)
    with pytest.raises(DeviceError, match="in flight"):
        rig.runtime.free(0, device)
    with pytest.raises(DeviceError, match="in flight"):
        rig.runtime.host_free(0, word.ctypes.data)
    rig.runtime.free(0, unnamed)
    word[:] = 1
    rig.runtime.stream_synchronize(0, stream)
    rig.runtime.free(0, device)
    rig.runtime.host_free(0, word.ctypes.data)


def test_memory_of_a_kernel_while_others_begin_and_end(rig: Rig) -> None:
    """Each sees what was allocated before it began, until it ends."""
    gates, adder = [rig.pinned(4) for _ in range(2)], Adder(rig.runtime)
    streams = [rig.runtime.stream_create(0) for _ in range(3)]
    memory = []
    for gate, stream in zip(gates, streams, strict=False):
        memory.append(rig.upload(rig.pinned(N)))
        adder.launch(argument(memory[-1], COUNT, 1, gate.ctypes.data), stream)
    adder.launch(argument(memory[0], COUNT, 1), streams[2])  # begins and ends while they run
    wait(rig, streams[2])
    for gate, stream in zip(gates, streams, strict=False):
        gate[:] = 1
        rig.runtime.stream_synchronize(0, stream)
    assert [int(words_of(rig.download(each, N))[0]) for each in memory] == [2, 1]


def test_the_host_can_not_touch_device_memory_after_a_kernel(rig: Rig, vendor: str) -> None:
    case = """
address = rig.upload(rig.pinned(4096))
adder.launch(argument(address, 1024, 7), stream)
rig.runtime.stream_synchronize(0, stream)
print(int(words_of(rig.download(address, 4096)).sum()), flush=True)
ctypes.string_at(address, 1)
print("read", flush=True)
"""
    done = run(vendor, case)
    assert done.stdout.split() == [str(7 * 1024)], done.stderr
    assert done.returncode == -signal.SIGSEGV


def test_a_kernel_reaches_other_devices_by_peer_access_only(rig: Rig, vendor: str) -> None:
    case = """
address = rig.upload(rig.pinned(4096), 1)
for enabled in (True, False):
    if enabled:
        rig.runtime.enable_peer_access(0, 1)
    else:
        rig = Rig(sys.argv[1])
        adder, stream = Adder(rig.runtime), rig.runtime.stream_create(0)
        address = rig.upload(rig.pinned(4096), 1)
    adder.launch(argument(address, 1024, 1), stream)
    rig.runtime.stream_synchronize(0, stream)
    print(int(words_of(rig.download(address, 4096, 1)).sum()), flush=True)
"""
    done = run(vendor, case)
    reached = ["1024"] if expected(vendor).get("kernels_reach_peers", True) else []
    assert done.stdout.split() == reached, done.stderr
    assert done.returncode == -signal.SIGSEGV


def test_a_kernel_reaches_imported_memory(rig: Rig, vendor: str) -> None:
    data = rig.random(N)
    base = rig.upload(data)
    case = f"""
print(rig.runtime.ipc_process_id(0), flush=True)
base = rig.runtime.ipc_import(0, bytes.fromhex(sys.stdin.readline()))
adder.launch(argument(base, {COUNT}, 9), stream)
rig.runtime.stream_synchronize(0, stream)
rig.runtime.ipc_close(0, base)
"""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command_of(vendor, case), stdin=pipe, stdout=pipe, stderr=pipe, text=True
    ) as importer:
        assert importer.stdout is not None
        handle = rig.runtime.ipc_export(0, base, N, int(importer.stdout.readline()))
        _, said = importer.communicate(f"{handle.hex()}\n", timeout=120)
    assert importer.returncode == 0, said
    assert (words_of(rig.download(base, N)) == words_of(data) + np.uint32(9)).all()
