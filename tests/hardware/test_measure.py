# SPDX-License-Identifier: Apache-2.0
"""Measuring over a runtime that copies host memory, and without one."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from sage_kv_connector.devices.runtime import (
    CopyKind,
    DeviceError,
    DeviceLost,
    DeviceRuntime,
    RuntimeFeatures,
    RuntimeUnavailable,
)
from sage_kv_connector.hardware.probing.profile import HardwareProfile, Measurement
from sage_kv_connector.hardware.report import measure as measuring
from sage_kv_connector.hardware.report.measure import measure, measured_links
from sage_kv_connector.hardware.report.recommend import recommend
from tests.hardware.recorded import profile_of


class HostMemoryRuntime:
    """What ``measure`` calls of a DeviceRuntime, over malloc and memmove."""

    vendor = "nvidia"
    api = "a test's runtime"
    emulated = True
    features = RuntimeFeatures(**dict.fromkeys(RuntimeFeatures._fields, True))

    def __init__(self, lost: int | None = None) -> None:
        self.lost = lost
        self.held: dict[int, Any] = {}
        self.copied: list[tuple[CopyKind | str, int]] = []

    def _hold(self, nbytes: int) -> int:
        buffer = ctypes.create_string_buffer(nbytes)
        address = ctypes.addressof(buffer)
        self.held[address] = buffer
        return address

    def alloc(self, device: int, nbytes: int) -> int:
        if device == self.lost:
            raise DeviceLost("nvidia", "alloc", 46, "lost")
        return self._hold(nbytes)

    def host_alloc(self, device: int, nbytes: int) -> int:
        return self._hold(nbytes)

    def stream_create(self, device: int) -> int:
        return self._hold(1)

    event_create = stream_create

    def free(self, device: int, address: int) -> None:
        del self.held[address]

    host_free = stream_destroy = event_destroy = free

    def copy_async(
        self, device: int, destination: int, source: int, nbytes: int, kind: CopyKind, stream: int
    ) -> None:
        ctypes.memmove(destination, source, nbytes)
        self.copied.append((kind, nbytes))

    def copy_peer_async(
        self,
        destination: int,
        destination_device: int,
        source: int,
        source_device: int,
        nbytes: int,
        stream: int,
    ) -> None:
        ctypes.memmove(destination, source, nbytes)
        self.copied.append(("peer", nbytes))

    def event_record(self, device: int, event: int, stream: int) -> None: ...

    def event_synchronize(self, device: int, event: int) -> None: ...

    def can_access_peer(self, device: int, peer: int) -> bool:
        return True

    def enable_peer_access(self, device: int, peer: int) -> None: ...


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "BUFFER", 1 << 16)
    monkeypatch.setattr(measuring, "ROUNDS", 2)
    monkeypatch.setattr(measuring, "PINGS", 3)


def measured(runtime: HostMemoryRuntime | Exception, name: str = "nvidia") -> HardwareProfile:
    profile = profile_of(name).model_copy(deep=True)

    def opener(vendor: str) -> DeviceRuntime:
        assert vendor == "nvidia"
        if isinstance(runtime, Exception):
            raise runtime
        return runtime  # type: ignore[return-value]

    measure(profile, opener)
    return profile


def test_host_memory_and_loopback_are_always_timed() -> None:
    profile = measured(RuntimeUnavailable("libcuda.so.1: not found"))
    assert [(one.name, one.unit) for one in profile.measurements] == [
        ("memcpy", "bytes/s"),
        ("loopback", "bytes/s"),
        ("loopback", "us"),
    ]
    assert all(one.value > 0 for one in profile.measurements)
    assert any("not measured: libcuda.so.1" in note.text for note in profile.notes)
    assert not measured_links(profile)


def test_devices_override_the_table_and_say_so() -> None:
    runtime = HostMemoryRuntime()
    profile = measured(runtime)
    host = next(one for one in profile.links if (one.a, one.b) == ("nvidia0", "host"))
    assert host.bytes_per_s is not None and host.bytes_per_s.measured
    assert host.bytes_per_s.table_value == 63e9
    assert "emulated over host memory" in host.bytes_per_s.source
    assert host.latency_us is not None and host.latency_us.measured
    both = [one.value for one in profile.measurements if one.subject == "nvidia0" and one.unit == "bytes/s"]
    assert len(both) == 2 and host.bytes_per_s.value == min(both)
    assert not runtime.held, "buffers, streams and events are given back"


def test_one_pair_of_each_kind_is_timed() -> None:
    profile = measured(HostMemoryRuntime())
    pairs = [one for one in measured_links(profile) if one.b.startswith("nvidia")]
    assert [(one.a, one.b, one.path) for one in pairs] == [("nvidia0", "nvidia1", "NV6")]
    others = [one for one in profile.links if one.path == "NV6" and one not in pairs]
    assert all(one.bytes_per_s and not one.bytes_per_s.measured for one in others)


def test_a_lost_device_is_a_note_and_the_others_are_measured() -> None:
    runtime = HostMemoryRuntime(lost=1)
    profile = measured(runtime)
    assert any(note.about == "nvidia1" and "lost" in note.text for note in profile.notes)
    assert {one.subject for one in profile.measurements} >= {"nvidia0", "nvidia2", "nvidia3"}
    assert not runtime.held


def test_ports_without_perftest_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    profile = measured(RuntimeUnavailable("no"))
    said = [note for note in profile.notes if "ib_write_bw (perftest) is not here" in note.text]
    assert {note.about for note in said} == {"mlx5_1", "mlx5_2", "mlx5_3"}  # mlx5_0 is down


def test_a_port_s_loopback_bounds_its_rate_from_above(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(name: str, port: int) -> tuple[list[Measurement], list[str]]:
        value = 10e9 if name == "mlx5_1" else 90e9  # the ports' rate is 50 GB/s
        return [Measurement(name="RDMA", subject=name, value=value, unit="bytes/s", how="a test")], []

    monkeypatch.setattr(measuring, "measure_port", fake)
    profile = measured(RuntimeUnavailable("no"))
    speeds = {one.a: one.bytes_per_s for one in profile.links if one.a.startswith("mlx5")}
    slow, fast = speeds["mlx5_1"], speeds["mlx5_2"]
    assert slow and (slow.value, slow.measured, slow.table_value) == (10e9, True, 50e9)
    assert fast and (fast.value, fast.measured) == (50e9, False)


def test_a_library_that_does_not_start_is_a_note() -> None:
    profile = measured(DeviceError("nvidia", "cuInit", 100, "NO_DEVICE"))
    assert any("cuInit failed with 100" in note.text for note in profile.notes)
    assert recommend(profile).preset == "high-bw"
