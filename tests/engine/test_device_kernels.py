# SPDX-License-Identifier: Apache-2.0
"""Who converts KV on a device: its kernels, or the CPU where they can't, which is said."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from sage_kv_connector.contract.cache_view import GroupView
from sage_kv_connector.devices.runtime import DeviceError
from sage_kv_connector.engine.conversion.device_kernels import DeviceKernels
from sage_kv_connector.engine.conversion.device_rooms import BUFFERED_PARTS, LEFT_BYTES, DeviceRooms
from sage_kv_connector.engine.conversion.staging import LARGEST_PART_BYTES
from sage_kv_connector.engine.conversion.wire_plan import converted_planes
from sage_kv_connector.format.wire_format import WireFormat
from sage_kv_connector.kernels.registry import BY_ADDRESS, kernel_sources
from tests.engine.converting_side import ConvertingSide, Shape
from tests.engine.device_side import DeviceSide
from tests.engine.test_conversion import TOKENS, MakeCore, check, pages_for, write_content
from tests.vendors.kernels import VENDORS_OF_KERNELS
from tests.vendors.rig import Rig

PAGES = 24
BUFFER_BYTES = 2 * BUFFERED_PARTS * LARGEST_PART_BYTES


@pytest.fixture(params=VENDORS_OF_KERNELS)
def vendor(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def handed_over(prefill: DeviceSide, decode: ConvertingSide, wire: str) -> None:
    there, here = pages_for(prefill, 1), pages_for(decode, 2)
    content = write_content(prefill, there, range(TOKENS))
    prefill.upload()
    offer = prefill.offer("t", there)
    prefill.ready("t", offer, slice(None), len(there))
    prefill.core.finish("t")
    decode.subscribe(prefill, "t", range(TOKENS), here, finished=True)
    outcome = decode.outcomes.get(timeout=10)
    assert outcome.ok, outcome.error
    check(prefill, decode, content, here, range(TOKENS), wire)


def free_bytes(rig: Rig) -> int | None:
    """Of device 0; None where a runtime does not tell."""
    return rig.runtime.memory_info(0)[0] if rig.runtime.features.memory_info else None


def launched(side: DeviceSide) -> tuple[int, int]:
    """Launches and copies of what left the device."""
    counters = side.core.counters()
    return counters["d2h_launches"], counters["d2h_copies"]


@pytest.mark.parametrize("wire", ["auto", "fp8_e4m3", "int4"])
def test_a_part_is_one_launch_and_one_copy(make_native_core: MakeCore, vendor: str, wire: str) -> None:
    prefill = DeviceSide(make_native_core, Shape(), PAGES, Rig(vendor, memory_bytes=160 << 20))
    handed_over(prefill, ConvertingSide(make_native_core, Shape(), PAGES, target_dtype=wire), wire)
    counters = prefill.core.counters()
    assert counters["d2h_launches"] == counters["d2h_copies"] == counters["d2h_jobs"] > 0
    assert counters["d2h_bytes"] == counters["bytes_sent"]


def test_a_wire_dtype_that_nobody_expected_goes_the_cpus_way(
    make_native_core: MakeCore, vendor: str, caplog: pytest.LogCaptureFixture
) -> None:
    prefill = DeviceSide(make_native_core, Shape(), PAGES, Rig(vendor, memory_bytes=160 << 20))
    with caplog.at_level(logging.WARNING):
        handed_over(
            prefill, ConvertingSide(make_native_core, Shape(), PAGES, target_dtype="fp8_e5m2"), "fp8_e5m2"
        )
    launches, copies = launched(prefill)
    assert launches == 0 and copies > 0
    assert "there is no kernel of bf16 to fp8_e5m2" in caplog.text


def test_a_full_device_is_converted_by_the_cpu(
    make_native_core: MakeCore, vendor: str, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(vendor, memory_bytes=BUFFER_BYTES)
    with caplog.at_level(logging.WARNING):
        prefill = DeviceSide(make_native_core, Shape(), PAGES, rig)
    known = f"buffers take {BUFFER_BYTES} and {LEFT_BYTES} must be left"
    assert (known if rig.runtime.features.memory_info else "no room on the device for buffers") in caplog.text
    handed_over(prefill, ConvertingSide(make_native_core, Shape(), PAGES), "auto")
    assert launched(prefill)[0] == 0


def test_without_a_compiler_the_cpu_converts(
    vendor: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rig = Rig(vendor)
    monkeypatch.setenv("SAGE_KVT_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    kernels = DeviceKernels(rig.runtime, 0, "bf16", ())
    assert "c++ is not installed" in kernels.lacks
    assert kernels.group("bf16", GroupView("full", 16, 4, ()), []) is None


def test_buffers_are_given_back(vendor: str) -> None:
    told = Rig(vendor).runtime.features.memory_info
    rig = Rig(vendor, memory_bytes=BUFFER_BYTES + (LEFT_BYTES if told else BUFFER_BYTES // 2))
    free = free_bytes(rig)
    rooms = DeviceRooms(rig.runtime, 0, 256 << 20, buffers=True)
    assert rooms.lacks == "" and (free is None or free_bytes(rig) == free - BUFFER_BYTES)
    again = DeviceRooms(rig.runtime, 0, 256 << 20, buffers=True)
    assert again.lacks and again.buffer_bytes == 0
    rooms.close()
    again.close()
    assert free_bytes(rig) == free
    assert DeviceRooms(rig.runtime, 0, 256 << 20, buffers=True).lacks == ""


def test_planes_that_kernels_do_not_have_go_the_cpus_way(
    make_native_core: MakeCore, vendor: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Rotated wires, for one: nobody asks for them, and the kernels name what they lack."""
    side = DeviceSide(make_native_core, Shape(), PAGES, Rig(vendor, memory_bytes=160 << 20))
    view = side.view.groups[0]
    planes = converted_planes(view, 0, (WireFormat("bf16"),) * 2, side.schema, side.schema, side.schema)
    kernels = DeviceKernels(Rig(vendor).runtime, 0, "bf16", ())
    assert kernels.group("bf16", view, planes) is not None
    rotated = [plane._replace(format=WireFormat("int4", "token", rotate=True)) for plane in planes]
    with caplog.at_level(logging.WARNING):
        assert kernels.group("bf16", view, rotated) is kernels.group("bf16", view, rotated) is None
    assert caplog.text.count("rotate is for measurements") == 1


@pytest.mark.parametrize("vendor", sorted(BY_ADDRESS))
@pytest.mark.parametrize("verb", ["encode", "decode"])
def test_kernels_that_differ_from_the_cpu_are_not_used(
    vendor: str, verb: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A planted one: what is launched for fp8 is what belongs to another dtype of as many bytes."""
    rig = Rig(vendor, memory_bytes=32 << 20)
    load = rig.runtime.load_function
    sources = kernel_sources(vendor)

    def other(device: int, code: bytes, name: str) -> int:
        if name == f"kv_{verb}_bf16_fp8_e4m3":
            name = name.replace("e4m3", "e5m2")
            code = sources.compiled("bf16", "fp8_e5m2", rig.runtime.architecture(device))
        return load(device, code, name)

    monkeypatch.setattr(rig.runtime, "load_function", other)
    free = free_bytes(rig)
    with caplog.at_level(logging.ERROR):
        kernels = DeviceKernels(rig.runtime, 0, "bf16", ())
    assert kernels.lacks == "" and free_bytes(rig) == free
    assert "for bf16 to fp8_e4m3 are not used, they differ: " in caplog.text
    assert ("encoded wire" if verb == "encode" else "decoded pages") in caplog.text
    with pytest.raises(ValueError, match="there is no kernel of bf16 to fp8_e4m3"):
        kernels._function("encode", "bf16", "fp8_e4m3")
    assert kernels._function("encode", "bf16", "int4")


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("vendor", sorted(BY_ADDRESS))
def test_kernels_of_every_cache_dtype_pass_their_trial(
    vendor: str, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        kernels = DeviceKernels(Rig(vendor).runtime, 0, dtype, ("bf16",))
    assert kernels.lacks == "" and "differ" not in caplog.text
    assert kernels._function("decode", dtype, "int4")


def test_a_launch_that_fails_leaves_conversion_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig("nvidia")

    def refused(*_: object) -> None:
        raise DeviceError("nvidia", "cuLaunchKernel", 701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES")

    monkeypatch.setattr(rig.runtime, "launch", refused)
    assert "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES" in DeviceKernels(rig.runtime, 0, "bf16", ()).lacks
