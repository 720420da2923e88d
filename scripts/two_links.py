# SPDX-License-Identifier: Apache-2.0
"""Two hosts, two links, one of which is taken down in mid-transfer, again and again: nothing is lost or wrong.

    python -m scripts.two_links [--rounds N] [--mbit N] [--seed N]

Hosts are network namespaces (root, iproute2). Each round moves bytes from one to the other by backend tcp, takes a link
down at either end at a random moment, and puts it up again. JSON: rounds; wrong; gap_ms: from bytes that landed to the
next ones that did, the longest of each round; late_ms: how much longer a round took than it had to, what was left when
the link went down taking twice as long; seconds of a transfer with both links, and with one that goes down.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sage_kv_connector.backends.base import Event, EventKind
from sage_kv_connector.backends.tcp.backend import TcpBackend
from sage_kv_connector.bench.ab.links import address, device, two_hosts

LINKS = 2
CHUNK_BYTES = 256 << 10
#: What a transfer takes over both links.
TRANSFER_S = 0.5
PATIENCE_S = 60.0
ROOT = Path(__file__).resolve().parents[1]


def kv(seed: int, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Bytes of a round."""
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def events(backend: TcpBackend) -> Iterator[Event]:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        backend.wait(0.5)
        for event in backend.poll():
            until = time.monotonic() + PATIENCE_S
            if event.kind in (EventKind.CLOSED, EventKind.WINDOW_FAILED):
                raise ConnectionError(event.detail)
            yield event
    raise TimeoutError(f"nothing happened for {PATIENCE_S:g} s")


def receive(hosts: list[str], size: int) -> None:
    """Says where it listens. For each seed that comes it opens a window, and tells how that was filled."""
    backend = TcpBackend(links=hosts, chunk_bytes=CHUNK_BYTES)
    print(backend.listen(f"tcp://{hosts[0]}:0"), flush=True)
    target = np.zeros(size, np.uint8)
    backend.register_memory(target.ctypes.data, size)
    connection = window = seed = 0
    began = last = gap = 0.0
    for event in events(backend):
        now = time.monotonic()
        if event.kind == EventKind.ACCEPTED:
            connection = event.connection
            backend.authorize(connection)
        elif event.kind == EventKind.MESSAGE:
            seed, began, last, gap = int(event.payload), now, now, 0.0
            target[:] = 0
            segments = np.array([[target.ctypes.data, size]], np.uint64)
            window = backend.open_window(connection, segments, 1, notify_chunks=True)
            backend.send(connection, backend.window_descriptor(window))
        elif event.kind in (EventKind.LANDED, EventKind.WINDOW_DONE):
            gap, last = max(gap, now - last), now
            if event.kind == EventKind.WINDOW_DONE:
                backend.close_window(window)
                told = {"gap_ms": gap * 1000, "seconds": now - began}
                told["right"] = bool(np.array_equal(target, kv(seed, size)))
                backend.send(connection, json.dumps(told).encode())


def send(to: str, size: int) -> None:
    """For each seed on stdin: says when its bytes leave, and what the other side tells of them."""
    backend = TcpBackend(lanes=LINKS, chunk_bytes=CHUNK_BYTES)
    connection = backend.connect(to, 10.0)
    happened = events(backend)
    next(event for event in happened if event.kind == EventKind.CONNECTED)
    backend.authorize(connection)
    source = np.zeros(size, np.uint8)
    backend.register_memory(source.ctypes.data, size)
    for line in sys.stdin:
        source[:] = kv(int(line), size)
        until = time.monotonic() + PATIENCE_S
        while backend.connection_info(connection).lanes < LINKS:
            assert time.monotonic() < until, "the link did not come back"
            time.sleep(0.01)
        backend.send(connection, line.strip().encode())
        window = next(event.payload for event in happened if event.kind == EventKind.MESSAGE)
        rows = np.array([[source.ctypes.data, 0, size]], np.uint64)
        backend.post(connection, window, rows, 1)
        print("leaves", flush=True)
        print(
            next(event.payload for event in happened if event.kind == EventKind.MESSAGE).decode(), flush=True
        )


class Side:
    """A process at a host."""

    def __init__(self, enter: tuple[str, ...], *words: str) -> None:
        self.process = subprocess.Popen(
            [*enter, sys.executable, "-m", "scripts.two_links", *words],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def line(self) -> str:
        assert self.process.stdout is not None
        line: str = self.process.stdout.readline()
        if not line:
            raise ConnectionError(f"a side ended with {self.process.wait()}")
        return line.strip()


def rounds_of(count: int, mbit: float, seed: int) -> dict[str, Any]:
    """See the module. Raises LinkError, ConnectionError."""
    random_ = random.Random(seed)
    size = int(LINKS * mbit * 1e6 / 8 * TRANSFER_S)
    found: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    with two_hosts(mbit, LINKS) as hosts:
        names = [address(hosts.decode, link) for link in range(LINKS)]
        receiver = Side(hosts.decode.enter, "--receive", *names, "--size", str(size))
        sender = Side(hosts.prefill.enter, "--send", receiver.line(), "--size", str(size))

        def move(number: int, broken: bool) -> None:
            sender.ask(str(seed + number))
            assert sender.line() == "leaves"
            if broken:
                namespace = random_.choice(hosts).namespace
                words = ["ip", "-n", namespace, "link", "set", device(random_.randrange(LINKS))]
                at_s = random_.uniform(0, TRANSFER_S)
                time.sleep(at_s)
                subprocess.run([*words, "down"], check=True)
            found[broken].append(json.loads(sender.line()))
            if broken:
                found[broken][-1]["at_s"] = at_s
                subprocess.run([*words, "up"], check=True)

        try:
            for number in range(count):
                if number % 20 == 0:
                    move(2 * number, broken=False)
                move(2 * number + 1, broken=True)
        finally:
            for side in (sender, receiver):
                side.process.kill()
                side.process.wait()
    both_s = statistics.median(one["seconds"] for one in found[False])
    # What was left when it went down takes twice as long over one link.
    late = [(one["seconds"] - max(both_s, 2 * both_s - one["at_s"])) * 1000 for one in found[True]]
    return {
        "rounds": count,
        "wrong": sum(not one["right"] for ones in found.values() for one in ones),
        "gap_ms": _spread([one["gap_ms"] for one in found[True]]),
        "late_ms": _spread(late),
        "seconds": {
            "both": both_s,
            "one goes down": statistics.median(one["seconds"] for one in found[True]),
        },
        "mbit": mbit,
    }


def _spread(values: list[float]) -> dict[str, float]:
    values = sorted(values)
    return {
        "median": statistics.median(values),
        "p99": values[int(0.99 * (len(values) - 1))],
        "most": values[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--mbit", type=float, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--receive", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--send", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.receive:
        receive(given.receive, given.size)
    elif given.send:
        send(given.send, given.size)
    else:
        print(json.dumps(rounds_of(given.rounds, given.mbit, given.seed)))


if __name__ == "__main__":
    main()
