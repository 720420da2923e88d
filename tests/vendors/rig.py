# SPDX-License-Identifier: Apache-2.0
"""An emulated node with one vendor's runtime, and the handful of calls that tests repeat."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from sage_kv_connector.devices.runtime import (
    CopyKind,
    DeviceError,
    DeviceRuntime,
    MisalignedAddress,
)
from sage_kv_connector.vendors import open_runtime, vendor_module
from sage_kv_connector.vendors.common.c_interface import CInterface
from sage_kv_connector.vendors.common.libraries import Library, candidates
from sage_kv_connector.vendors.emulator import EmulatorSettings
from sage_kv_connector.vendors.emulator.build import load_emulator
from sage_kv_connector.vendors.emulator.control import EmulatorControl, control_of

Bytes = npt.NDArray[np.uint8]
H2D, D2H, D2D = CopyKind.HOST_TO_DEVICE, CopyKind.DEVICE_TO_HOST, CopyKind.DEVICE_TO_DEVICE


def interface_of(vendor: str) -> CInterface:
    found: CInterface = vendor_module(vendor, "runtime").INTERFACE
    return found


def emulator_of(vendor: str) -> Library:
    """A new machine's functions, for a runtime of the test's own making."""
    calls = Path(str(vendor_module(vendor, "runtime").__file__)).parent / "emulator.cc"
    return load_emulator(interface_of(vendor), calls, EmulatorSettings())


def loads(vendor: str) -> bool:
    interface = interface_of(vendor)
    for name in candidates(interface):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False


def expected(vendor: str) -> dict[str, Any]:
    """What tests have to know of a vendor beside its features: ``tests/vendors/<vendor>/expected.yaml``."""
    path = Path(__file__).parent / vendor / "expected.yaml"
    found: dict[str, Any] = yaml.safe_load(path.read_text()) if path.exists() else {}
    return found


class Rig:
    """``kernels``: False for a library too old to launch any."""

    def __init__(self, vendor: str, kernels: bool = True, **settings: Any) -> None:
        self.runtime: DeviceRuntime = open_runtime(vendor, EmulatorSettings(**settings))
        if not kernels:
            runtime: Any = self.runtime
            for name in filter(None, runtime.kernel_calls):
                del runtime._c[name]
        self.control: EmulatorControl = control_of(self.runtime)
        # Some libraries have a code of their own for this; the others' failure is a plain DeviceError.
        tells = getattr(self.runtime, "kinds", {}).get(MisalignedAddress)
        self.misaligned: type[DeviceError] = MisalignedAddress if tells else DeviceError

    def pinned(self, nbytes: int, device: int = 0) -> Bytes:
        """Zeroed pinned memory; lives as long as the process."""
        address = self.runtime.host_alloc(device, nbytes)
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))

    def random(self, nbytes: int, seed: int = 0) -> Bytes:
        memory = self.pinned(nbytes)
        memory[:] = np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)
        return memory

    def upload(self, data: Bytes, device: int = 0) -> int:
        address = self.runtime.alloc(device, len(data))
        self.write(address, data, device)
        return address

    def write(self, address: int, data: Bytes, device: int = 0) -> None:
        stream = self.runtime.stream_create(device)
        self.runtime.copy_async(device, address, data.ctypes.data, len(data), H2D, stream)
        self.runtime.stream_synchronize(device, stream)
        self.runtime.stream_destroy(device, stream)

    def download(self, address: int, nbytes: int, device: int = 0) -> Bytes:
        data = self.pinned(nbytes, device)
        stream = self.runtime.stream_create(device)
        self.runtime.copy_async(device, data.ctypes.data, address, nbytes, D2H, stream)
        self.runtime.stream_synchronize(device, stream)
        self.runtime.stream_destroy(device, stream)
        return data

    def marked(self, stream: int, device: int = 0) -> int:
        """An event recorded behind all work of a stream."""
        event = self.runtime.event_create(device)
        self.runtime.event_record(device, event, stream)
        return event
