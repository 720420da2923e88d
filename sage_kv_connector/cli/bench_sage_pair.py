# SPDX-License-Identifier: Apache-2.0
"""The two ends of ``sage-kvt bench sage``: sageLLM's own KVTransferEngine over its backend and over ours.

Run as a program it is the sending rank, driven by lines: ``python -m … '{"socket": …}'``.
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

SENDER, RECEIVER = 0, 1
TIMEOUT_S = 60.0


def contenders(rank: int, ports: Mapping[str, Sequence[int]], names: Sequence[str]) -> dict[str, Any]:
    """One backend of each name: "socket" (theirs), "shm" and "tcp" (ours). Both ranks call it at once."""
    from sagellm_kv_cache.transfer import SocketTransferBackend

    from sage_kv_connector.config import KVTransportConfig
    from sage_kv_connector.integrations.sage.comm_backend import SageKvtCommBackend

    made: dict[str, Any] = {}
    for name in names:
        if name == "socket":
            endpoints = {one: ("127.0.0.1", port) for one, port in enumerate(ports[name])}
            backend: Any = SocketTransferBackend(
                rank=rank, world_size=2, endpoints=endpoints, recv_timeout_s=TIMEOUT_S
            )
            backend.start()
        else:
            backend = SageKvtCommBackend(KVTransportConfig.load({"backend": name, "deadline_s": TIMEOUT_S}))
            backend.init(rank, 2, "127.0.0.1", ports[name][0])
        made[name] = backend
    return made


def close(made: dict[str, Any]) -> None:
    for name, backend in made.items():
        backend.close() if name == "socket" else backend.destroy()


def move(backend: Any, buffers: Sequence[bytearray], way: str) -> None:
    """This rank's half: all buffers through ``KVTransferEngine`` ("engine") or its pipeline ("pipeline").

    One worker: with more, buffers that threads take at once are paired by chance (docs/sage.md).
    Raises RuntimeError when one did not arrive.
    """
    from sagellm_kv_cache.transfer import KVHandle, KVTransferEngine, KVTransferPipeline

    engine = KVTransferEngine(backend)
    handles = [KVHandle(handle_id=uuid.uuid4(), num_tokens=1) for _ in buffers]
    if way == "engine":
        for handle, buffer in zip(handles, buffers, strict=True):
            engine.transfer_kv_handle(handle, SENDER, RECEIVER, buffer)
        return
    pipeline = KVTransferPipeline(engine, max_workers=1)
    futures = [
        pipeline.submit(handle, SENDER, RECEIVER, buffer)
        for handle, buffer in zip(handles, buffers, strict=True)
    ]
    for future in futures:
        future.result(TIMEOUT_S)
    pipeline.shutdown()


def content(index: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """What round ``index`` moves; both ranks can make it."""
    return np.random.default_rng(index).integers(0, 256, nbytes, dtype=np.uint8)


def fill(buffers: Sequence[bytearray], data: npt.NDArray[np.uint8]) -> None:
    size = len(buffers[0])
    for index, buffer in enumerate(buffers):
        np.frombuffer(buffer, dtype=np.uint8)[:] = data[index * size : (index + 1) * size]


def main() -> None:
    """Lines in: ``NAME WAY BUFFERS ROUND`` or ``quit``; one line out for each, when it is ready or done."""
    ports, names, total = json.loads(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
    made = contenders(SENDER, ports, names)
    print("ready", flush=True)
    buffers: list[bytearray] = []
    for line in sys.stdin:
        if line.strip() == "quit":
            break
        name, way, count, index = line.split()
        if len(buffers) != int(count):  # kept over rounds, as a KV pool is
            buffers = [bytearray(total // int(count)) for _ in range(int(count))]
        fill(buffers, content(int(index), total))
        print("filled", flush=True)
        if sys.stdin.readline().strip() != "go":
            break
        begun = time.perf_counter()
        move(made[name], buffers, way)
        print(json.dumps({"sent_s": time.perf_counter() - begun}), flush=True)
    close(made)


if __name__ == "__main__":
    main()
