# SPDX-License-Identifier: Apache-2.0
"""The two ends of ``sage-kvt bench sage``: sageLLM's own KVTransferEngine over its backend and over ours.

Run as a program it is the sending rank, driven by lines: ``python -m … '{"socket": …}'``.
"""

from __future__ import annotations

import json
import socket
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sage_kv_connector import _data_plane
from sage_kv_connector.integrations.sage.payload import Tagged

SENDER, RECEIVER = 0, 1
TIMEOUT_S = 60.0
#: Bytes of one call to send or receive when the loopback's own speed is measured.
SOCKET_BLOCK = 1 << 20
WORKERS = 4


class Way(NamedTuple):
    """How everything is moved.

    ``pipelined``: through KVTransferPipeline. ``tagged``: with several workers over our backend, which a
    tag keeps apart; the other one knows no tags, and has one worker in any case. ``copied``: the sender
    holds bytearrays, which KVTransferEngine copies first.
    """

    shown: str
    handles: int
    pipelined: bool = False
    tagged: bool = False
    copied: bool = False


WAYS = {
    "engine": Way("KVTransferEngine, bytes", 1),
    "pipeline": Way("KVTransferPipeline, bytes", 64, pipelined=True),
    "pipeline_tagged": Way(
        f"KVTransferPipeline, tags and {WORKERS} workers", 64, pipelined=True, tagged=True
    ),
    "engine_bytearray": Way("KVTransferEngine, bytearray", 1, copied=True),
}


def contenders(rank: int, ports: Mapping[str, Sequence[int]], names: Sequence[str]) -> dict[str, Any]:
    """One backend of each name: "socket" (theirs), the others ours. Both ranks call it at once."""
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


def move(backend: Any, buffers: Sequence[bytes | bytearray], way: Way) -> None:
    """This rank's half: all buffers through ``KVTransferEngine`` or its pipeline.

    Without tags one worker: with more, buffers that threads take at once are paired by chance (docs/sage.md).
    Raises RuntimeError when one did not arrive.
    """
    from sagellm_kv_cache.transfer import (
        KVHandle,
        KVTransferEngine,
        KVTransferPipeline,
        SocketTransferBackend,
    )

    engine = KVTransferEngine(backend)
    handles = [KVHandle(handle_id=uuid.uuid4(), num_tokens=1) for _ in buffers]
    if not way.pipelined:
        for handle, buffer in zip(handles, buffers, strict=True):
            engine.transfer_kv_handle(handle, SENDER, RECEIVER, buffer)
        return
    payloads: list[Any] = list(buffers)
    tagged = way.tagged and not isinstance(backend, SocketTransferBackend)
    if tagged:
        payloads = [Tagged(one, str(index)) for index, one in enumerate(buffers)]
    pipeline = KVTransferPipeline(engine, max_workers=WORKERS if tagged else 1)
    futures = [
        pipeline.submit(handle, SENDER, RECEIVER, payload)
        for handle, payload in zip(handles, payloads, strict=True)
    ]
    for future in futures:
        future.result(TIMEOUT_S)
    pipeline.shutdown()


def content(index: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """What round ``index`` moves, other bytes everywhere than its neighbours'; both ranks can make it."""
    shifted: npt.NDArray[np.uint8] = _random(nbytes) + np.uint8(index % 256)
    return shifted


@cache
def _random(nbytes: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, nbytes, dtype=np.uint8)


def outgoing(data: npt.NDArray[np.uint8], way: Way) -> list[bytes | bytearray]:
    """What the sender hands over. Of the types that both contenders take, the engine copies all but bytes."""
    size = len(data) // way.handles
    parts = [data[index * size : (index + 1) * size] for index in range(way.handles)]
    return [bytearray(one) if way.copied else one.tobytes() for one in parts]


def fill(buffers: Sequence[bytearray], data: npt.NDArray[np.uint8]) -> None:
    size = len(buffers[0])
    for index, buffer in enumerate(buffers):
        np.frombuffer(buffer, dtype=np.uint8)[:] = data[index * size : (index + 1) * size]


def loopback_receive(listener: socket.socket, target: npt.NDArray[np.uint8]) -> float:
    """Seconds that one plain TCP connection from the other process takes to fill ``target``."""
    listener.settimeout(TIMEOUT_S)
    connection, _ = listener.accept()
    with connection:
        connection.setblocking(True)
        connection.sendall(b"g")
        return _data_plane.measure_socket_receive(
            connection.fileno(), target.ctypes.data, target.nbytes, SOCKET_BLOCK
        )


def loopback_send(port: int, source: npt.NDArray[np.uint8]) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.recv(1)
        _data_plane.measure_socket_send(connection.fileno(), source.ctypes.data, source.nbytes, SOCKET_BLOCK)


def main() -> None:
    """Lines in: ``NAME WAY ROUND``, ``loopback PORT`` or ``quit``; a line out when ready or done."""
    ports, names, total = json.loads(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
    made = contenders(SENDER, ports, names)
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "quit":
            break
        if line.startswith("loopback"):
            loopback_send(int(line.split()[1]), content(0, total))
            print("sent", flush=True)
            continue
        name, way, index = line.split()
        buffers = outgoing(content(int(index), total), WAYS[way])
        print("filled", flush=True)
        if sys.stdin.readline().strip() != "go":
            break
        begun = time.perf_counter()
        move(made[name], buffers, WAYS[way])
        print(json.dumps({"sent_s": time.perf_counter() - begun}), flush=True)
    close(made)


if __name__ == "__main__":
    main()
