# SPDX-License-Identifier: Apache-2.0
"""Kernels on streams, on the emulators. A pinned word that a kernel waits for keeps it running: no timing."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from sage_kv_connector.devices.runtime import (
    DeviceError,
    DeviceLost,
    DmaFailed,
    UnsupportedByRuntime,
)
from tests.vendors.kernels import (
    Adder,
    argument,
    kernel_rig,
    module_for,
    shape_of,
    wait,
    words_of,
)
from tests.vendors.rig import D2H, H2D, Rig, expected

COUNT = 1024
N = 4 * COUNT


@pytest.fixture
def rig(vendor: str) -> Rig:
    return kernel_rig(vendor)


def test_what_launches_no_kernels_says_so(vendor: str) -> None:
    runtime = Rig(vendor).runtime
    if runtime.features.kernels:
        pytest.skip("it does")
    assert not runtime.features.kernels_read_pinned
    for call in (
        lambda: runtime.architecture(0),
        lambda: runtime.load_function(0, b"", "add_words"),
        lambda: runtime.launch(0, (0, (1, 1), 1, 0, b""), 0),
    ):
        with pytest.raises(UnsupportedByRuntime, match="no kernels are launched"):
            call()


def test_kernels_of_an_emulator_are_the_host_s(rig: Rig) -> None:
    assert rig.runtime.architecture(0) == "host"


def test_a_launch_is_in_order_with_copies(rig: Rig) -> None:
    data, back, device = rig.random(N), rig.pinned(N), rig.runtime.alloc(0, N)
    stream, adder = rig.runtime.stream_create(0), Adder(rig.runtime)
    rig.control.hold("h2d")
    for added in (1, 2):
        rig.runtime.copy_async(0, device, data.ctypes.data, N, H2D, stream)
        adder.launch(argument(device, COUNT, added), stream)
    rig.runtime.copy_async(0, back.ctypes.data, device, N, D2H, stream)
    assert not back.any()
    rig.control.release()
    rig.runtime.stream_synchronize(0, stream)
    assert (words_of(back) == words_of(data) + np.uint32(2)).all()


def test_an_event_behind_a_launch_waits_for_it(rig: Rig) -> None:
    gate, device, stream = rig.pinned(4), rig.upload(rig.random(N)), rig.runtime.stream_create(0)
    Adder(rig.runtime).launch(argument(device, COUNT, 1, gate.ctypes.data), stream)
    event = rig.marked(stream)
    assert not rig.runtime.event_query(0, event)
    gate[:] = 1
    rig.runtime.event_synchronize(0, event)
    assert rig.runtime.event_query(0, event)


def test_another_stream_waits_for_a_launch(rig: Rig) -> None:
    data, gate = rig.random(N), rig.pinned(4)
    device, back = rig.upload(data), rig.pinned(N)
    first, second = rig.runtime.stream_create(0), rig.runtime.stream_create(0)
    Adder(rig.runtime).launch(argument(device, COUNT, 3, gate.ctypes.data), first)
    rig.runtime.stream_wait_event(0, second, rig.marked(first))
    rig.runtime.copy_async(0, back.ctypes.data, device, N, D2H, second)
    done = rig.marked(second)
    assert not rig.runtime.event_query(0, done)
    gate[:] = 1
    rig.runtime.event_synchronize(0, done)
    assert (words_of(back) == words_of(data) + np.uint32(3)).all()


def test_streams_run_kernels_beside_one_another(rig: Rig) -> None:
    """The first one ends only because the second runs."""
    gate = rig.pinned(4)
    first, second = rig.runtime.stream_create(0), rig.runtime.stream_create(0)
    device, adder = rig.upload(rig.pinned(N)), Adder(rig.runtime)
    adder.launch(argument(device, COUNT, 1, gate.ctypes.data), first)
    adder.launch(argument(gate.ctypes.data, 1, 1), second)
    wait(rig, first)
    assert (words_of(rig.download(device, N)) == 1).all()


def test_the_argument_is_copied_by_the_call(rig: Rig) -> None:
    device, stream, data = rig.runtime.alloc(0, N), rig.runtime.stream_create(0), rig.random(N)
    given = argument(device, COUNT, 1)
    rig.control.hold("h2d")
    rig.runtime.copy_async(0, device, data.ctypes.data, N, H2D, stream)
    Adder(rig.runtime).launch(given, stream)
    ctypes.memset(ctypes.c_char_p(given), 0xFF, len(given))  # in place, as no caller should
    assert given == b"\xff" * len(given)
    rig.control.release()
    rig.runtime.stream_synchronize(0, stream)
    assert (words_of(rig.download(device, N)) == words_of(data) + np.uint32(1)).all()


def test_a_launch_has_its_shape(rig: Rig) -> None:
    words, stream = rig.pinned(16), rig.runtime.stream_create(0)
    function = rig.runtime.load_function(0, module_for("host"), "write_shape")
    blocks, threads, shared = shape_of(rig.runtime.vendor)
    where = words.ctypes.data.to_bytes(8, "little")
    rig.runtime.launch(0, (function, blocks, threads, shared, where), stream)
    rig.runtime.stream_synchronize(0, stream)
    assert words_of(words).tolist() == [*blocks, threads, shared]


def test_kernels_read_tables_and_data_in_pinned_memory(rig: Rig) -> None:
    if not rig.runtime.features.kernels_read_pinned:
        pytest.skip("they are not promised to")
    data, stream = rig.random(N), rig.runtime.stream_create(0)
    before = words_of(data).copy()
    Adder(rig.runtime).launch(argument(data.ctypes.data, COUNT, 5), stream)
    rig.runtime.stream_synchronize(0, stream)
    assert (words_of(data) == before + np.uint32(5)).all()


def test_a_module_is_loaded_once_a_device(rig: Rig) -> None:
    code = module_for("host")
    load = rig.runtime.load_function
    assert load(0, code, "add_words") == load(0, bytes(bytearray(code)), "add_words")
    other = load(1, code, "add_words")
    assert other != load(0, code, "add_words")
    with pytest.raises(DeviceError):  # the other device's function
        rig.runtime.launch(0, (other, (1, 1), 1, 0, argument(0, 0, 0)), rig.runtime.stream_create(0))


def test_unknown_images_and_names(rig: Rig) -> None:
    code, names = module_for("host"), expected(rig.runtime.vendor).get("unknown", {})
    for image in (b"", b"\x7fEL", b"not an image of any kind", code[:64] + bytes(4096)):
        with pytest.raises(DeviceError) as caught:
            rig.runtime.load_function(0, image, "add_words")
        assert named(caught.value).endswith(names.get("image", "invalidimage")), image[:10]
    for name in ("subtract_words", "has_no_size", ""):
        with pytest.raises(DeviceError) as caught:
            rig.runtime.load_function(0, code, name)
        assert named(caught.value).endswith(names.get("name", "notfound")), name


def named(error: DeviceError) -> str:
    """The vendor's name without its own way of writing; prefixes differ."""
    assert error.name in str(error)
    return error.name.lower().replace("_", "")


def test_what_a_launch_refuses(rig: Rig) -> None:
    stream, adder, given = rig.runtime.stream_create(0), Adder(rig.runtime), argument(0, 0, 0)
    before = rig.control.launches()
    (_, rows), threads, shared_bytes = shape_of(rig.runtime.vendor)
    fewer = [((1, 2), 1, 0)] if rows == 1 else []
    if shared_bytes == 0:
        fewer += [((1, 1), threads + 1, 0), ((1, 1), 1, 1)]
    for blocks, threads, shared in (
        *fewer,
        ((0, 1), 1, 0),
        ((1, 0), 1, 0),
        ((1, 65536), 1, 0),
        ((1 << 31, 1), 1, 0),
        ((1, 1), 0, 0),
        ((1, 1), 1025, 0),
        ((1, 1), 1, (48 << 10) + 1),
    ):
        with pytest.raises(DeviceError, match="blocks of"):
            rig.runtime.launch(0, (adder.function, blocks, threads, shared, given), stream)
    with pytest.raises(DeviceError, match="no such function"):
        rig.runtime.launch(0, (stream, (1, 1), 1, 0, given), stream)
    with pytest.raises(DeviceError):  # the stream of another device
        adder.launch(given, rig.runtime.stream_create(1))
    assert rig.control.launches() == before
    rig.runtime.stream_synchronize(0, stream)  # refused calls left nothing behind


def test_launches_are_counted(rig: Rig) -> None:
    device, stream, adder = rig.runtime.alloc(0, N), rig.runtime.stream_create(0), Adder(rig.runtime)
    launches, copies = rig.control.launches(), rig.control.counts()
    for _ in range(3):
        adder.launch(argument(device, COUNT, 1), stream)
    rig.runtime.stream_synchronize(0, stream)
    assert rig.control.launches() == launches + 3
    assert rig.control.counts() == copies


def test_a_failed_stream_drops_launches(rig: Rig) -> None:
    data, word, device = rig.random(N), rig.pinned(4), rig.runtime.alloc(0, N)
    stream, adder = rig.runtime.stream_create(0), Adder(rig.runtime)
    rig.control.set(dma_error_after_copies=1)
    rig.control.hold("h2d")
    adder.launch(argument(word.ctypes.data, 1, 1), stream)  # counts as no copy
    for _ in range(2):
        rig.runtime.copy_async(0, device, data.ctypes.data, N, H2D, stream)
        adder.launch(argument(word.ctypes.data, 1, 1), stream)
    event = rig.marked(stream)
    rig.control.release()
    with pytest.raises(DmaFailed):
        rig.runtime.event_synchronize(0, event)
    assert words_of(word).tolist() == [2]
    with pytest.raises(DmaFailed):
        adder.launch(argument(word.ctypes.data, 1, 1), stream)
    other = rig.runtime.stream_create(0)
    adder.launch(argument(word.ctypes.data, 1, 1), other)
    rig.runtime.stream_synchronize(0, other)
    assert words_of(word).tolist() == [3]


def test_a_lost_device_drops_launches(rig: Rig) -> None:
    data, word, device = rig.random(N), rig.pinned(4), rig.runtime.alloc(0, N)
    stream, adder = rig.runtime.stream_create(0), Adder(rig.runtime)
    rig.control.set(device_lost_after_copies=0)
    rig.control.hold("h2d")
    rig.runtime.copy_async(0, device, data.ctypes.data, N, H2D, stream)
    adder.launch(argument(word.ctypes.data, 1, 1), stream)
    event = rig.marked(stream)
    rig.control.release()
    with pytest.raises(DeviceLost):
        rig.runtime.event_synchronize(0, event)
    assert words_of(word).tolist() == [0]
    for call in (
        lambda: adder.launch(argument(word.ctypes.data, 1, 1), stream),
        lambda: rig.runtime.load_function(0, module_for("host"), "add_words"),
    ):
        with pytest.raises(DeviceLost):
            call()
    survivor = rig.runtime.stream_create(1)
    Adder(rig.runtime, 1).launch(argument(word.ctypes.data, 1, 1), survivor)
    rig.runtime.stream_synchronize(1, survivor)
    assert words_of(word).tolist() == [1]
