# SPDX-License-Identifier: Apache-2.0
"""What is asked of the XPU runtime for kernels: generations, images, and arguments in the device's memory."""

from __future__ import annotations

import ctypes
import io
import zipfile
from dataclasses import replace
from threading import Thread
from typing import Any

import numpy as np
import pytest

from sage_kv_connector.devices.runtime import DeviceError, DmaFailed, UnsupportedByRuntime
from sage_kv_connector.engine.conversion.device_kernels import DeviceKernels
from sage_kv_connector.vendors.kunlunxin.abi import KERNELS
from sage_kv_connector.vendors.kunlunxin.arguments import ARGUMENT_BYTES, SLOT_BYTES, SLOTS, ArgumentRing
from sage_kv_connector.vendors.kunlunxin.runtime import CONSTANT, KunlunxinRuntime
from tests.vendors.kernels import Adder, argument, module_for, words_of
from tests.vendors.rig import Rig, emulator_of


def real(**functions: Any) -> KunlunxinRuntime:
    """A runtime that takes its library for a real one; functions that are None are not in it."""
    library = emulator_of("kunlunxin")
    found = {name: call for name, call in (library.functions | functions).items() if call is not None}
    return KunlunxinRuntime(replace(library, functions=found, emulator=None))


def test_kernels_are_compiled_for_the_generation() -> None:
    models = [1, 2, 299, 300, 599, 600]

    def attribute(out: Any, which: int, device: int) -> int:
        assert which == CONSTANT["XPUATTR_MODEL"]
        out._obj.value = models[device]
        return 0

    runtime = real(xpu_device_get_attr=attribute)
    assert [runtime.architecture(device) for device in range(1, 5)] == ["xpu2", "xpu2", "xpu3", "xpu3"]
    for device in (0, 5):
        with pytest.raises(UnsupportedByRuntime, match=f"not for model {models[device]} of device {device}"):
            runtime.architecture(device)


@pytest.mark.parametrize("lost", KERNELS)
def test_without_one_of_the_functions_there_are_no_kernels(lost: str) -> None:
    runtime = real(**{lost: None})
    assert not runtime.features.kernels
    assert DeviceKernels(runtime, 0, "bf16", ()).lacks == f"{runtime.api} launches no kernels"


def test_a_zip_has_the_code_of_each_kernel() -> None:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as image:
        image.writestr("add_words", module_for("host"))
        image.writestr("has_no_size", module_for("host"))
    rig = Rig("kunlunxin")
    for name in ("subtract_words", "has_no_size"):
        with pytest.raises(DeviceError, match="xpu_create_cl_func"):
            rig.runtime.load_function(0, made.getvalue(), name)
    adder, device, stream = Adder(rig.runtime), rig.upload(rig.pinned(64)), rig.runtime.stream_create(0)
    adder.function = rig.runtime.load_function(0, made.getvalue(), "add_words")
    adder.launch(argument(device, 16, 3), stream)
    rig.runtime.stream_synchronize(0, stream)
    assert (words_of(rig.download(device, 64)) == 3).all()


def test_errors_have_the_runtime_s_own_words() -> None:
    told = real(xpu_strerror=lambda code: f"words of {code}".encode())
    with pytest.raises(DeviceError, match="words of 701"):
        told.alloc(7, 64)
    with pytest.raises(DeviceError, match="XPUERR_INVALID_DEVICE"):
        real(xpu_strerror=None).alloc(7, 64)


def test_a_long_argument_is_on_the_device_when_its_kernel_begins() -> None:
    calls: list[tuple[Any, ...]] = []

    def noted(*given: Any) -> int:
        calls.append(given)
        return 0

    rig = Rig("kunlunxin")
    rig.runtime = runtime = real(**dict.fromkeys(KERNELS[1:], noted))
    stream, addresses = runtime.stream_create(0), []
    for number in range(2 * SLOTS):
        given = bytes([number]) * (ARGUMENT_BYTES + 1)
        runtime.launch(0, (7, (3, 1), 64, 0, given), stream)
        runtime.stream_synchronize(0, stream)
        (address, *place), *rest = calls[-3:]
        assert place == [8, 0] and rest == [(3, 64, stream), (7,)]
        addresses.append(int.from_bytes(address, "little"))
        assert bytes(rig.download(addresses[-1], len(given))) == given
    assert len(set(addresses)) == SLOTS
    by_value = bytes(range(256)) * 2
    runtime.launch(0, (7, (1, 1), 1, 0, by_value), stream)
    assert calls[-3] == (by_value, ARGUMENT_BYTES, 0)
    with pytest.raises(ValueError, match=f"{SLOT_BYTES + 1} bytes, at most {SLOT_BYTES}"):
        runtime.launch(0, (7, (1, 1), 1, 0, bytes(SLOT_BYTES + 1)), stream)


def test_a_slot_is_not_written_while_its_launch_is_under_way() -> None:
    """The first kernel waits for a word; the launch that wants its slot again waits for it."""
    rig = Rig("kunlunxin")
    ring, adder, word = ArgumentRing(rig.runtime, 0), Adder(rig.runtime), rig.pinned(4)
    streams = [rig.runtime.stream_create(0) for _ in range(2)]
    with ring.placed(b"first", streams[0]) as first:
        adder.launch(argument(0, 0, 0, word.ctypes.data), streams[0])
    for _ in range(SLOTS - 1):
        with ring.placed(b"other", streams[1]):
            pass
    again: list[int] = []

    def place() -> None:
        with ring.placed(b"again", streams[1]) as address:
            again.append(address)

    waiting = Thread(target=place)
    waiting.start()
    rig.runtime.stream_synchronize(0, streams[1])
    waiting.join(0.2)
    assert again == [] and waiting.is_alive()
    assert bytes(rig.download(first, 5)) == b"first"
    word[:] = 1
    waiting.join(30)
    rig.runtime.stream_synchronize(0, streams[1])
    assert again == [first] and bytes(rig.download(first, 5)) == b"again"


def test_a_failed_stream_does_not_fail_the_next_user_of_its_slot() -> None:
    rig = Rig("kunlunxin")
    ring = ArgumentRing(rig.runtime, 0)
    broken, whole = rig.runtime.stream_create(0), rig.runtime.stream_create(0)
    rig.control.set(dma_error_after_copies=0)
    rig.control.hold("h2d")
    with ring.placed(b"first", broken):
        pass
    rig.control.release()
    with pytest.raises(DmaFailed):
        rig.runtime.stream_synchronize(0, broken)
    for number in range(SLOTS):
        with ring.placed(bytes([number]), whole) as address:
            pass
    rig.runtime.stream_synchronize(0, whole)
    assert bytes(rig.download(address, 1)) == bytes([SLOTS - 1])


def test_an_argument_of_the_library_has_its_limit() -> None:
    functions = emulator_of("kunlunxin").functions
    longest = np.zeros(ARGUMENT_BYTES + 4, np.uint8)
    place = longest.ctypes.data_as(ctypes.c_void_p)
    assert functions["xpu_launch_argument_set"](place, ARGUMENT_BYTES, 0) == 0
    for nbytes, offset in ((ARGUMENT_BYTES + 4, 0), (8, ARGUMENT_BYTES - 4), (4, 2)):
        assert functions["xpu_launch_argument_set"](place, nbytes, offset) != 0
