# SPDX-License-Identifier: Apache-2.0
"""Kernels through a library whose modules are like the CUDA driver's."""

from __future__ import annotations

import ctypes
import threading
from abc import abstractmethod
from typing import ClassVar, NamedTuple

from sage_kv_connector.devices.runtime import DeviceError, Launch
from sage_kv_connector.vendors.common.cuda_like import CudaLikeRuntime
from sage_kv_connector.vendors.common.libraries import Library


class KernelCalls(NamedTuple):
    """Functions by what they do; their arguments stand beside them."""

    load: str  #: out module, image
    function: str  #: out function, module, name
    launch: str  #: function, blocks and threads (three numbers each), shared bytes; stream, parameters, 0


class KernelRuntime(CudaLikeRuntime):
    """A vendor's class gives ``kernel_calls`` too, and says what kernels are compiled for."""

    kernel_calls: ClassVar[KernelCalls]

    def __init__(self, library: Library) -> None:
        super().__init__(library)
        # The image is kept with its module: HIP reads from it later.
        self._modules: dict[tuple[int, bytes], int] = {}
        self._loading = threading.Lock()  # a load takes long, so not the lock that every call takes

    def architecture(self, device: int) -> str:
        return "host" if self.emulated else self._compiled_for(device)

    @abstractmethod
    def _compiled_for(self, device: int) -> str:
        """``architecture`` of a real device."""

    def load_function(self, device: int, code: bytes, name: str) -> int:
        with self._on(device), self._loading:
            if (device, code) not in self._modules:
                self._modules[device, code] = self._load_module(code)
            return self._find_kernel(self._modules[device, code], name.encode())

    def _load_module(self, code: bytes) -> int:
        return self._pointer(self.kernel_calls.load, code)

    def _find_kernel(self, module: int, name: bytes) -> int:
        return self._pointer(self.kernel_calls.function, module, name)

    def launch(self, device: int, launch: Launch, stream: int) -> None:
        function, *_, argument = launch
        words = self._launch_words(launch)
        parameters = ctypes.cast((ctypes.c_char_p * 1)(argument), ctypes.POINTER(ctypes.c_void_p))
        with self._on(device):
            self._call(self.kernel_calls.launch, function, *words, stream, parameters, None)

    def _launch_words(self, launch: Launch) -> tuple[int, ...]:
        """What the vendor's call takes between function and stream."""
        _, blocks, threads, shared_bytes, _ = launch
        return (*blocks, 1, threads, 1, 1, shared_bytes)

    def _refused(self, launch: Launch, why: str) -> DeviceError:
        """Of a launch whose shape the device's kernels can't have."""
        _, blocks, threads, shared_bytes, _ = launch
        shape = f"{blocks[0]} x {blocks[1]} blocks of {threads} threads with {shared_bytes} bytes"
        return self._unsupported(self.kernel_calls.launch, f"{shape}: {why}")
