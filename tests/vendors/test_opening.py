# SPDX-License-Identifier: Apache-2.0
"""Which library a runtime gets, and what is said when there is none."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sage_kv_connector.devices.runtime import (
    CopyKind,
    DeviceRuntime,
    RuntimeUnavailable,
    UnsupportedByRuntime,
)
from sage_kv_connector.vendors import VENDORS, available_runtimes, open_runtime, vendor_module
from sage_kv_connector.vendors.emulator import EmulatorSettings
from sage_kv_connector.vendors.emulator.control import control_of
from tests.vendors.rig import Rig, emulator_of, expected, interface_of, loads


def test_without_a_library_it_says_what_was_tried(vendor: str) -> None:
    if loads(vendor):
        pytest.skip("the vendor's library is installed here")
    interface = interface_of(vendor)
    with pytest.raises(RuntimeUnavailable) as caught:
        open_runtime(vendor)
    assert all(name in str(caught.value) for name in interface.sonames)
    assert isinstance(available_runtimes()[vendor], str)


def test_unknown_vendor() -> None:
    with pytest.raises(ValueError, match=f"vendor is 'huawei'; known are {', '.join(VENDORS)}"):
        open_runtime("huawei")


def test_available_runtimes_asks_real_libraries_only() -> None:
    assert set(available_runtimes()) == set(VENDORS)


def test_the_contract_is_met(rig: Rig) -> None:
    assert isinstance(rig.runtime, DeviceRuntime)


def test_an_older_library_without_the_optional_functions(vendor: str) -> None:
    """What is left still works, and ``features`` says what is gone."""
    interface = interface_of(vendor)
    module = vendor_module(vendor, "runtime")
    library = emulator_of(vendor)
    kept = set(interface.one_of[-1:])
    gone = (interface.optional - kept) | {f"{each.name} (older)" for each in interface.prototypes(older=True)}
    functions = {name: call for name, call in library.functions.items() if name not in gone}
    runtime: DeviceRuntime = module.create(replace(library, functions=functions))
    assert not runtime.features.batched_copies
    host, back = runtime.host_alloc(0, 8192), runtime.host_alloc(0, 8192)
    ctypes.memset(host, 7, 8192)
    memory, stream, event = runtime.alloc(0, 8192), runtime.stream_create(0), runtime.event_create(0)
    for to, start, kind in ((memory, host, CopyKind.HOST_TO_DEVICE), (back, memory, CopyKind.DEVICE_TO_HOST)):
        rows = np.array([(to, start, 4096), (to + 4096, start + 4096, 4096)], np.uint64)
        runtime.copy_batch_async(0, rows, kind, stream)
    runtime.event_record(0, event, stream)
    runtime.event_synchronize(0, event)
    assert ctypes.string_at(back, 8192) == b"\7" * 8192
    assert runtime.allocation_of(0, memory + 1, 1) == (memory, 8192)
    if not runtime.features.host_register:
        with pytest.raises(UnsupportedByRuntime):
            runtime.host_register(0, host, 4096)
    if not runtime.features.ipc:
        with pytest.raises(UnsupportedByRuntime):
            runtime.ipc_export(0, memory, 8192, 1)
    told = expected(vendor).get("older_library", {})
    seen = (runtime.features.host_register, runtime.features.ipc)
    assert seen == (told.get("host_register", True), told.get("ipc", True))


def test_a_library_with_the_older_form_of_a_batch_is_called_once(vendor: str) -> None:
    interface = interface_of(vendor)
    if "cuMemcpyBatchAsync" not in interface.older_declarations:
        pytest.skip("there is one form, or none")
    library = emulator_of(vendor)
    older = {name: call for name, call in library.functions.items() if name != "cuMemcpyBatchAsync"}
    runtime: DeviceRuntime = vendor_module(vendor, "runtime").create(replace(library, functions=older))
    assert runtime.features.batched_copies
    host, memory, stream = runtime.host_alloc(0, 8192), runtime.alloc(0, 8192), runtime.stream_create(0)
    rows = np.array([(memory, host, 4096), (memory + 4096, host + 4096, 4096)], np.uint64)
    runtime.copy_batch_async(0, rows, CopyKind.HOST_TO_DEVICE, stream)
    runtime.stream_synchronize(0, stream)
    counted = control_of(runtime).counts()["h2d"]
    assert (counted.calls, counted.copies, counted.bytes) == (1, 2, 8192)


def test_no_compiler_for_an_emulator(vendor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGE_KVT_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeUnavailable, match=r"no C\+\+ compiler was found"):
        open_runtime(vendor, EmulatorSettings())


def test_settings_name_what_is_wrong(rig: Rig) -> None:
    with pytest.raises(ValueError, match="peer_access must be true, false or 2 rows of 2"):
        EmulatorSettings(peer_access=((True,),))
    with pytest.raises(ValueError, match="bandwidth"):
        EmulatorSettings.model_validate({"bandwidth": 1})
    with pytest.raises(ValueError, match="only rates, latency, held, virtual_memory and faults can change"):
        rig.control.set(memory_bytes=4096)


def test_rates_take_their_time(vendor: str) -> None:
    """Only that a rate delays at all; how exactly is for benchmarks, not for a shared machine."""
    import time

    rig = Rig(vendor, h2d_gbytes_per_s=0.01, latency_us=1000)
    data = rig.random(1 << 18)
    begun = time.monotonic()
    rig.upload(data)
    assert time.monotonic() - begun >= (1 << 18) / 0.01e9
