# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt probe --measure``: time what tables only claim, and let that win.

Bandwidths are bytes a second of the best of some rounds (what the path can do), latencies the
median in microseconds. Some seconds in all; buffers of 64 MiB, larger than caches.
"""

from __future__ import annotations

import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np

from sage_kv_connector.devices.runtime import (
    CopyKind,
    DeviceError,
    DeviceRuntime,
    RuntimeUnavailable,
)
from sage_kv_connector.hardware.probing.accelerator_descriptor import Fact
from sage_kv_connector.hardware.probing.profile import Device, HardwareProfile, Link, Measurement, Note
from sage_kv_connector.hardware.report.measure_rdma import measure_port
from sage_kv_connector.vendors import open_runtime

BUFFER = 64 << 20
ROUNDS = 5
PINGS = 200

OpenRuntime = Callable[[str], DeviceRuntime]


def measure(profile: HardwareProfile, open_runtime: OpenRuntime = open_runtime) -> None:
    """Time host memory, loopback, devices and RDMA ports; fills ``measurements`` and overrides links' facts.

    What can't be measured is a note with its reason; nothing raises for it.
    """
    profile.measurements += [_memcpy(), *_loopback()]
    runtimes: dict[str, DeviceRuntime | None] = {}
    for device in profile.devices:
        if device.vendor not in runtimes:
            runtimes[device.vendor] = _open(profile, device.vendor, open_runtime)
        runtime = runtimes[device.vendor]
        if runtime is not None:
            _measure_device(profile, device, runtime)
    for vendor, runtime in runtimes.items():
        if runtime is not None and runtime.features.peer_copies:
            _measure_peers(profile, vendor, runtime)
    for port in profile.rdma:
        if port.active:
            measured, said = measure_port(port.name, port.port)
            profile.measurements += measured
            profile.notes += [Note(about=port.name, text=text) for text in said]
    _override(profile)


def _memcpy() -> Measurement:
    """Copying between two buffers of host memory on one thread; each byte is counted once."""
    source, target = np.ones(BUFFER, np.uint8), np.zeros(BUFFER, np.uint8)
    best = min(_timed(lambda: np.copyto(target, source)) for _ in range(ROUNDS))
    return Measurement(
        name="memcpy", subject="host", value=BUFFER / best, unit="bytes/s", how="one thread, 64 MiB"
    )


def _timed(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _loopback() -> list[Measurement]:
    """TCP through 127.0.0.1, one connection, two threads of this process."""
    payload = memoryview(bytearray(BUFFER))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        echo = threading.Thread(target=_serve, args=(server,), daemon=True)
        echo.start()
        with socket.create_connection(server.getsockname(), timeout=10) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

            def stream() -> None:
                client.sendall(struct.pack("<Q", len(payload)))
                client.sendall(payload)
                client.recv(1)

            def ping() -> None:
                client.sendall(struct.pack("<Q", 0))
                client.recv(1)

            stream()  # warm up: buffers grow
            best = min(_timed(stream) for _ in range(ROUNDS))
            round_trip = statistics.median(_timed(ping) for _ in range(PINGS))
        echo.join(10)
    how = "tcp over 127.0.0.1, one connection"
    return [
        Measurement(name="loopback", subject="host", value=BUFFER / best, unit="bytes/s", how=how),
        Measurement(
            name="loopback",
            subject="host",
            value=round_trip / 2 * 1e6,
            unit="us",
            how=f"{how}, half a round trip",
        ),
    ]


def _serve(server: socket.socket) -> None:
    """Read a length and so many bytes, answer one byte; until the client closes."""
    connection, _ = server.accept()
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        buffer = bytearray(1 << 20)
        while header := connection.recv(8, socket.MSG_WAITALL):
            (left,) = struct.unpack("<Q", header)
            while left:
                got = connection.recv_into(buffer, min(left, len(buffer)))
                if not got:
                    return
                left -= got
            connection.sendall(b"k")


def _open(profile: HardwareProfile, vendor: str, open_runtime: OpenRuntime) -> DeviceRuntime | None:
    try:
        return open_runtime(vendor)
    except (RuntimeUnavailable, DeviceError, ValueError) as error:
        profile.notes.append(Note(about=vendor, text=f"its devices are not measured: {error}"))
        return None


@contextmanager
def _buffers(runtime: DeviceRuntime, device: int) -> Iterator[tuple[int, int, int, int]]:
    """Device memory, pinned host memory, a stream and an event; given back in any case."""
    with ExitStack() as undo:
        memory = runtime.alloc(device, BUFFER)
        undo.callback(runtime.free, device, memory)
        host = runtime.host_alloc(device, BUFFER)
        undo.callback(runtime.host_free, device, host)
        stream = runtime.stream_create(device)
        undo.callback(runtime.stream_destroy, device, stream)
        event = runtime.event_create(device)
        undo.callback(runtime.event_destroy, device, event)
        yield memory, host, stream, event


def _how(runtime: DeviceRuntime) -> str:
    return f"{runtime.api}{', emulated over host memory' if runtime.emulated else ''}"


def _measure_device(profile: HardwareProfile, device: Device, runtime: DeviceRuntime) -> None:
    index = device.index
    try:
        with _buffers(runtime, index) as (memory, host, stream, event):
            for name, target, source, kind in (
                ("H2D", memory, host, CopyKind.HOST_TO_DEVICE),
                ("D2H", host, memory, CopyKind.DEVICE_TO_HOST),
            ):

                def copy(
                    nbytes: int, target: int = target, source: int = source, kind: CopyKind = kind
                ) -> None:
                    runtime.copy_async(index, target, source, nbytes, kind, stream)
                    runtime.event_record(index, event, stream)
                    runtime.event_synchronize(index, event)

                profile.measurements += _of_copies(name, device.id, copy, _how(runtime))
    except DeviceError as error:
        profile.notes.append(Note(about=device.id, text=f"not measured: {error}"))


def _of_copies(name: str, subject: str, copy: Callable[[int], None], how: str) -> list[Measurement]:
    copy(BUFFER)
    best = min(_timed(lambda: copy(BUFFER)) for _ in range(ROUNDS))
    small = statistics.median(_timed(lambda: copy(4096)) for _ in range(PINGS))
    return [
        Measurement(
            name=name, subject=subject, value=BUFFER / best, unit="bytes/s", how=f"{how}, 64 MiB, pinned"
        ),
        Measurement(
            name=name, subject=subject, value=small * 1e6, unit="us", how=f"{how}, 4 KiB and an event"
        ),
    ]


def _measure_peers(profile: HardwareProfile, vendor: str, runtime: DeviceRuntime) -> None:
    """One pair of each word of the topology table; the others of that word are taken to be alike."""
    devices = {device.id: device for device in profile.devices if device.vendor == vendor}
    done: set[str] = set()
    for link in profile.links:
        if link.path in done or link.a not in devices or link.b not in devices:
            continue
        done.add(link.path)
        a, b = devices[link.a].index, devices[link.b].index
        try:
            if not runtime.can_access_peer(a, b):
                profile.notes.append(
                    Note(about=f"{link.a}, {link.b}", text="the runtime allows no peer access")
                )
                continue
            runtime.enable_peer_access(a, b)
            runtime.enable_peer_access(b, a)
            with _buffers(runtime, a) as (source, *_), _buffers(runtime, b) as (target, _, stream, event):

                def copy(
                    nbytes: int,
                    b: int = b,
                    a: int = a,
                    ends: tuple[int, int, int, int] = (target, source, stream, event),
                ) -> None:
                    to, of, queue, mark = ends
                    runtime.copy_peer_async(to, b, of, a, nbytes, queue)
                    runtime.event_record(b, mark, queue)
                    runtime.event_synchronize(b, mark)

                profile.measurements += _of_copies("D2D", f"{link.a}-{link.b}", copy, _how(runtime))
        except DeviceError as error:
            profile.notes.append(Note(about=f"{link.a}, {link.b}", text=f"not measured: {error}"))


def _override(profile: HardwareProfile) -> None:
    """Measured values take the place of the table's in the links they belong to."""
    by_subject: dict[tuple[str, str], list[Measurement]] = {}
    for one in profile.measurements:
        by_subject.setdefault((one.subject, one.unit), []).append(one)
    for link in profile.links:
        subject = f"{link.a}-{link.b}" if link.b not in ("host", "network") else link.a
        if link.b == "network" and all(port.name != link.a for port in profile.rdma):
            continue  # a device's copies say nothing of its network port
        # Of host to device and device to host the slower one bounds a hand-over.
        bandwidths = by_subject.get((subject, "bytes/s"), [])
        if bandwidths:
            slow = min(bandwidths, key=lambda one: one.value)
            rate = link.bytes_per_s
            # A port's own loopback can outrun its cable, never the other way round.
            if link.b != "network" or rate is None or slow.value < rate.value:
                link.bytes_per_s = _measured(rate, slow)
        latencies = by_subject.get((subject, "us"), [])
        if latencies:
            long = max(latencies, key=lambda one: one.value)
            link.latency_us = _measured(link.latency_us, long)


def _measured(before: Fact[float] | None, one: Measurement) -> Fact[float]:
    source = f"measured: {one.name}, {one.how}"
    if before is None:
        return Fact[float](value=one.value, source=source, measured=True)
    return before.overridden(one.value, source)


def measured_links(profile: HardwareProfile) -> list[Link]:
    """Links with a measured bandwidth."""
    return [link for link in profile.links if link.bytes_per_s is not None and link.bytes_per_s.measured]
