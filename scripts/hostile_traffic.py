# SPDX-License-Identifier: Apache-2.0
"""How fast honest peers are while strangers are at the port: idle sockets, noise, wrong secrets.

Two engines with a secret in two processes over tcp on loopback; a third process is the strangers. Rounds with
and without them take turns. Printed: both speeds, the median of their ratios within a round, and what prefill counted.
``python -m scripts.hostile_traffic --json``
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import queue
import random
import socket
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event as Switch
from statistics import median
from typing import Any

import numpy as np

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.engine.core import EngineCore
from sage_kv_connector.engine.pages.memory import MemorySource
from sage_kv_connector.engine.pages.target import MemoryTarget
from sage_kv_connector.engine.transfer.subscription import Wanted

IDLE, A_SECOND = 64, 20
SECRET = "of the servers"


def engine(secret: str, security: str | None) -> EngineCore:
    core = EngineCore(
        KVTransportConfig.load(
            {"backend": "tcp", "host": "127.0.0.1", "secret": secret, "security": security}
        )
    )
    core.start()
    return core


def segments(memory: np.ndarray[Any, Any]) -> Any:
    return np.array([[memory.ctypes.data, memory.nbytes]], dtype=np.uint64)


def prefill(pipe: Connection, security: str | None, nbytes: int) -> None:
    """Offers under the names that it is told; an empty one ends it, with what was refused."""
    core, memory = engine(SECRET, security), np.ones(nbytes, np.uint8)
    core.register_host_memory(memory.ctypes.data, nbytes)
    pipe.send((core.engine_id, core.addresses))
    while name := pipe.recv():
        core.offer(name, MemorySource(segments(memory)), lambda _: None)
        core.finish(name)
        pipe.send("offered")
    pipe.send(dict(core.sessions.refusals.by_code))
    core.close()


def strangers(address: str, at_it: Switch, over: Switch) -> None:
    """While ``at_it`` is set: 64 sockets that say nothing, and 20 a second that are noise or a wrong secret."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    guesser = engine("a guess", None)
    idle: list[socket.socket] = []
    while not over.is_set():
        if not at_it.wait(0.1):
            for one in idle:
                one.close()
            idle.clear()
            continue
        while len(idle) < IDLE:
            idle.append(socket.create_connection((host, int(port))))
        idle.pop(0).close()
        for _ in range(A_SECOND // 4):
            with contextlib.suppress(OSError), socket.create_connection((host, int(port))) as noisy:
                noisy.sendall(random.randbytes(4096))
        guesser.renew(PeerAddress("", 0, (address,)), ("t",))
        time.sleep(0.25)
    guesser.close()


def measure(security: str | None, nbytes: int, rounds: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    pipe, far = context.Pipe()
    source = context.Process(target=prefill, args=(far, security, nbytes))
    source.start()
    engine_id, addresses = pipe.recv()
    at_it, over = context.Event(), context.Event()
    crowd = context.Process(target=strangers, args=(addresses[0], at_it, over))
    crowd.start()
    core, memory = engine(SECRET, security), np.zeros(nbytes, np.uint8)
    core.register_host_memory(memory.ctypes.data, nbytes)
    outcomes: queue.Queue[Outcome] = queue.Queue()

    def fetch(name: str) -> float:
        pipe.send(name)
        pipe.recv()
        wanted = Wanted(name, MemoryTarget(segments(memory)), finished=True, deadline_s=60.0)
        begun = time.perf_counter()
        core.subscribe(PeerAddress(engine_id, 0, addresses), wanted, outcomes.put)
        outcome = outcomes.get(timeout=120)
        if not outcome.ok:
            raise SystemExit(f"a transfer failed: {outcome.error}")
        return nbytes / (time.perf_counter() - begun) / 1e9

    speeds: list[tuple[float, float]] = []
    for turn in range(rounds + 1):
        alone = median(fetch(f"alone {turn} {i}") for i in range(5))
        at_it.set()
        time.sleep(0.6)
        beside = median(fetch(f"beside {turn} {i}") for i in range(5))
        at_it.clear()
        time.sleep(0.3)
        speeds.append((alone, beside))
        print(f"round {turn} of {rounds}: {alone:.2f} GB/s, {beside:.2f} beside strangers", file=sys.stderr)
    over.set()
    crowd.join(10)
    pipe.send("")
    refused = pipe.recv()
    core.close()
    source.join(10)
    kept = speeds[1:]  # the first warms up
    return {
        "security": security or "authenticated",
        "gbytes_per_s": median(a for a, _ in kept),
        "beside_strangers": median(b for _, b in kept),
        "ratio": median(b / a for a, b in kept),
        "refused": refused,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--security", choices=("none", "authenticated", "encrypted"))
    parser.add_argument("--nbytes", type=int, default=64 << 20, help="of one transfer")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    result = measure(given.security, given.nbytes, given.rounds)
    if given.json:
        print(json.dumps(result))
    else:
        print(
            f"{result['security']}: {result['gbytes_per_s']:.2f} GB/s, {result['beside_strangers']:.2f} beside "
            f"strangers, ratio {result['ratio']:.2f}; refused {result['refused']}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
