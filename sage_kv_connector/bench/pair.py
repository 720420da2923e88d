# SPDX-License-Identifier: Apache-2.0
"""Two processes with shuffled blocks of memory between them: the contender and the limit of a transfer benchmark.

Run as ``python -m sage_kv_connector.bench.pair shm|tcp BLOCK_BYTES TOTAL_BYTES none|authenticated|encrypted
[unmeasured]``; lanes that are unmeasured take no times. It is driven by lines on stdin and answers each with a JSON
line on stdout, as the programs in ``baselines/`` do: ``run`` moves everything once, ``limit`` does what the machine
itself can do between the same two processes, ``small`` moves single blocks of 4 KiB, ``verify`` clears the target,
moves once and compares; ``quit`` or the end of stdin ends it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

from sage_kv_connector import _data_plane
from sage_kv_connector.backends import create_backend, loopback_address, settled_info
from sage_kv_connector.backends.base import (
    Backend,
    BackendOptions,
    Event,
    EventKind,
    Segments,
)
from sage_kv_connector.backends.protecting_backend import LANE_KEYS_BYTES, ProtectingBackend, TrafficKeys
from sage_kv_connector.bench.cpu_time import cpu_of_threads

SMALL_BYTES = 4096
SMALL_OPS = 300
TIMEOUT_S = 60.0
#: The first path of a connection is there in a small part of it.
WAY_S = 10.0
SEED = 11


class Blocks:
    """A buffer of ``total`` bytes, and its blocks in an order of its own."""

    def __init__(self, total: int, block: int, seed: int, *, filled: bool) -> None:
        self.block = block
        self.data: npt.NDArray[np.uint8] = np.empty(total, dtype=np.uint8)
        if filled:
            words = np.random.default_rng(SEED).integers(0, 1 << 63, total // 8, dtype=np.int64)
            self.data[:] = words.view(np.uint8)
        else:
            self.data[:] = 0
        self.order = np.random.default_rng(seed).permutation(total // block)
        self.address = int(self.data.ctypes.data)

    def segments(self) -> Segments:
        out = np.empty((len(self.order), 2), dtype=np.uint64)
        out[:, 0] = self.address + self.order.astype(np.uint64) * self.block
        out[:, 1] = self.block
        return out


def main() -> None:
    backend_name, block, total, security = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    options = BackendOptions(measures=sys.argv[5:] != ["unmeasured"])
    if block <= 0 or total % block or total < SMALL_BYTES:
        sys.exit(f"total bytes {total} must be a multiple of block bytes {block}, and at least {SMALL_BYTES}")
    context = multiprocessing.get_context("spawn")
    pipe, peer_pipe = context.Pipe()
    sender = (peer_pipe, backend_name, block, total, security, options)
    process = context.Process(target=serve_sender, args=sender, daemon=True)
    process.start()
    take_cores(0)
    receiver = Receiver(pipe, backend_name, block, total, security, options)
    from sage_kv_connector import __version__

    say({"name": f"sage_kvt {backend_name}", "version": __version__, "mode": receiver.mode})
    say("ready")
    commands = {
        "run": receiver.run,
        "limit": receiver.limit,
        "small": receiver.small,
        "verify": receiver.verify,
    }
    for line in sys.stdin:
        if line.strip() == "quit":
            break
        say(commands[line.strip()]())
    receiver.close()
    process.join(5)
    if process.is_alive():
        process.kill()


def take_cores(side: int) -> None:
    """Keep this process to one half of the cores; two that share one measure the scheduler."""
    cores = sorted(os.sched_getaffinity(0))
    middle = len(cores) // 2
    if middle:
        os.sched_setaffinity(0, cores[:middle] if side == 0 else cores[middle:])


def say(answer: dict[str, Any] | str) -> None:
    print(answer if isinstance(answer, str) else json.dumps(answer), flush=True)


class Receiver:
    """The side that opens windows and measures."""

    def __init__(
        self,
        pipe: Connection,
        backend_name: str,
        block: int,
        total: int,
        security: str,
        options: BackendOptions,
    ) -> None:
        self._pipe = pipe
        self._total = total
        self._blocks = Blocks(total, block, SEED + 1, filled=False)
        self._backend = create_backend(backend_name, options)
        self._backend.register_memory(self._blocks.address, total)
        self._sender_pid, self._sender_address, address = pipe.recv()
        self._connection = self._backend.connect(address, TIMEOUT_S)
        self._events = events_of(self._backend)
        self._early: list[Event] = []  # came before they were waited for
        self._await(EventKind.CONNECTED)
        protect(self._backend, self._connection, security, connects=True)
        pipe.send("protected")
        self._backend.authorize(self._connection)
        pipe.recv()  # the sender authorized us too
        info = settled_info(self._backend, self._connection, WAY_S)
        self.mode = info.mode
        self._checksum = info.crosses_wire
        self._port = 0

    def run(self) -> dict[str, Any]:
        spent, begun = self._cpu_s(), time.perf_counter()
        self._move(self._blocks.segments(), b"all")
        seconds = time.perf_counter() - begun
        return {"gbytes_per_s": self._total / seconds / 1e9, "cpu_s": self._cpu_s() - spent}

    def verify(self) -> dict[str, Any]:
        self._blocks.data[:] = 0
        self._move(self._blocks.segments(), b"all")
        source = Blocks(self._total, self._blocks.block, SEED, filled=True)
        rows = (-1, self._blocks.block)
        same = np.array_equal(
            self._blocks.data.reshape(rows)[self._blocks.order], source.data.reshape(rows)[source.order]
        )
        return {"verified": bool(same)}

    def small(self) -> dict[str, Any]:
        """From just before ``post`` in the sender to WINDOW_DONE seen in this process."""
        seen, enqueued = [], []
        segments = np.array([[self._blocks.address, SMALL_BYTES]], dtype=np.uint64)
        for _ in range(SMALL_OPS):
            seen.append(self._move(segments, b"one"))
            enqueued.append(int.from_bytes(self._await(EventKind.MESSAGE).payload, "little"))
        microseconds = [(s - e) / 1e3 for s, e in zip(seen, enqueued, strict=True)]
        return {
            "small_op_us_p50": float(np.percentile(microseconds, 50)),
            "small_op_us_p99": float(np.percentile(microseconds, 99)),
        }

    def limit(self) -> dict[str, Any]:
        crosses_nodes = self._backend.capabilities.crosses_nodes
        return self._limit_socket() if crosses_nodes else self._limit_readv()

    def _cpu_s(self) -> float:
        """CPU time of both processes until now."""
        both = (os.getpid(), self._sender_pid)
        return sum(seconds for process in both for _, seconds in cpu_of_threads(process))

    def close(self) -> None:
        self._pipe.send(("quit",))
        self._backend.close()

    def _limit_readv(self) -> dict[str, Any]:
        remote = Blocks(8, 8, SEED, filled=False)
        remote.block, remote.address = self._blocks.block, self._sender_address
        remote.order = np.random.default_rng(SEED).permutation(self._total // self._blocks.block)
        seconds = _data_plane.measure_process_vm_readv(
            self._sender_pid, self._blocks.segments(), remote.segments()
        )
        return {"name": "process_vm_readv", "gbytes_per_s": self._total / seconds / 1e9}

    def _limit_socket(self) -> dict[str, Any]:
        listener = socket.create_server(("127.0.0.1", 0))
        self._pipe.send(("socket", listener.getsockname()[1]))
        sock, _ = listener.accept()
        listener.close()
        with sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(b"g")
            seconds = _data_plane.measure_socket_receive(
                sock.fileno(), self._blocks.address, self._total, self._blocks.block
            )
            halves = _data_plane.measure_socket_ping(sock.fileno(), SMALL_BYTES, SMALL_OPS)
        self._pipe.recv()
        return {
            "name": "one socket pair, one block a call",
            "gbytes_per_s": self._total / seconds / 1e9,
            "half_rtt_us_p50": float(np.percentile(halves, 50)) * 1e6,
        }

    def _move(self, segments: Segments, what: bytes) -> int:
        """Have the window filled; returns when its end was seen (CLOCK_MONOTONIC ns)."""
        generation = secrets.randbits(62) | 1
        window = self._backend.open_window(self._connection, segments, generation)
        descriptor = self._backend.window_descriptor(window)
        header = what + generation.to_bytes(8, "little") + bytes([self._checksum])
        self._backend.send(self._connection, header + descriptor)
        self._await(EventKind.WINDOW_DONE)
        seen = time.monotonic_ns()
        self._backend.close_window(window)
        return seen

    def _await(self, kind: EventKind) -> Event:
        for event in self._early:
            if event.kind == kind:
                self._early.remove(event)
                return event
        for event in self._events:
            if event.kind == kind:
                return event
            self._early.append(event)
            if event.kind in (EventKind.CLOSED, EventKind.WINDOW_FAILED):
                break
        raise SystemExit(f"waited for {kind.name} in vain")


def protect(backend: Backend, connection: int, security: str, *, connects: bool) -> None:
    """One side of the connection; the keys are no secret here."""
    if security != "none":
        assert isinstance(backend, ProtectingBackend)
        keys = [bytes([side]) * LANE_KEYS_BYTES for side in (int(connects), int(not connects))]
        backend.protect(connection, TrafficKeys(security == "encrypted", *keys))


def serve_sender(
    pipe: Connection,
    backend_name: str,
    block: int,
    total: int,
    security: str,
    options: BackendOptions = BackendOptions(),  # noqa: B008 - a value
) -> None:
    """The other process: posts what windows ask for."""
    take_cores(1)
    blocks = Blocks(total, block, SEED, filled=True)
    backend = create_backend(backend_name, options)
    backend.register_memory(blocks.address, total)
    address = backend.listen(loopback_address(backend_name))
    pipe.send((os.getpid(), blocks.address, address))
    everything = np.empty((len(blocks.order), 3), dtype=np.uint64)
    everything[:, 0] = blocks.segments()[:, 0]
    everything[:, 1] = np.arange(len(blocks.order), dtype=np.uint64) * np.uint64(block)
    everything[:, 2] = block
    small = np.array([[blocks.address, 0, SMALL_BYTES]], dtype=np.uint64)
    accepted = next(event for event in events_of(backend) if event.kind == EventKind.ACCEPTED)
    pipe.recv()
    protect(backend, accepted.connection, security, connects=False)
    backend.authorize(accepted.connection)
    pipe.send("authorized")
    while True:
        if pipe.poll():
            order = pipe.recv()
            if order[0] == "quit":
                backend.close()
                return
            _serve_socket(order[1], blocks)
            pipe.send("done")
        backend.wait(0.05)
        for event in backend.poll():
            if event.kind == EventKind.MESSAGE:
                payload = event.payload
                what, generation, checksum = payload[:3], int.from_bytes(payload[3:11], "little"), payload[11]
                descriptors = everything if what == b"all" else small
                enqueued = time.monotonic_ns()
                backend.post(event.connection, payload[12:], descriptors, generation, checksum=bool(checksum))
                if what == b"one":
                    backend.send(event.connection, enqueued.to_bytes(8, "little"))


def _serve_socket(port: int, blocks: Blocks) -> None:
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.recv(1)
        _data_plane.measure_socket_send(sock.fileno(), blocks.address, len(blocks.data), blocks.block)
        _data_plane.socket_echo(sock.fileno(), SMALL_BYTES, SMALL_OPS)


def events_of(backend: Backend) -> Iterator[Event]:
    """Events as they come; ends when none came for TIMEOUT_S."""
    while backend.wait(TIMEOUT_S):
        yield from backend.poll()


if __name__ == "__main__":
    main()
