# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench sage``: sageLLM's KVTransferEngine over its SocketTransferBackend and over ours, in one run.

Two processes hold one backend of each contender; rounds go through all of them. A figure is the time
from "go" to the last byte in the receiver's buffer, as a median over rounds; ratios are medians of
the ratios within each round. Every byte of every round is compared, outside of the time. What the machine
itself can do is measured in between: one copy in memory, and one plain TCP connection over loopback.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from sage_kv_connector import _data_plane
from sage_kv_connector.backends import host_backends
from sage_kv_connector.bench import sage_pair as pair
from sage_kv_connector.console import bytes_text, progress
from sage_kv_connector.integrations.common.free_port import free_port

#: Total bytes must be a multiple of this.
MOST_HANDLES = max(way.handles for way in pair.WAYS.values())


class BenchError(RuntimeError):
    """The other process ended, or bytes differ; the message says which."""


def bench_sage(total_bytes: int, repeats: int) -> dict[str, Any]:
    """Run it. Raises BenchError, and ImportError without isagellm-kv-cache."""
    import sagellm_kv_cache.transfer  # noqa: F401  — say at once that it is missing

    names = ("socket", *host_backends())
    ports = {name: [free_port(), free_port()] for name in names}
    sender = subprocess.Popen(
        [
            sys.executable, "-m", pair.__name__,
            json.dumps(ports), json.dumps(names), str(total_bytes),
        ],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    made: dict[str, Any] = {}
    try:
        made = pair.contenders(pair.RECEIVER, ports, names)
        _expect(sender, "ready")
        limits: dict[str, list[float]] = {"memcpy": [], "loopback": []}
        ways = {}
        for way in pair.WAYS:
            ways[way] = _rounds(sender, made, way, total_bytes, repeats)
            _measure_limits(sender, limits, total_bytes, repeats)
    finally:
        pair.close(made)
        try:
            sender.communicate("quit\n", timeout=10)
        except (subprocess.TimeoutExpired, BrokenPipeError, ValueError):
            sender.kill()
            sender.wait()
    return {
        "total_bytes": total_bytes,
        "repeats": repeats,
        "ways": ways,
        "limits": {name: _figures(total_bytes, times) for name, times in limits.items()},
        "verified": True,
    }


def sage_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The result for people."""
    rows = []
    for way, found in result["ways"].items():
        size = bytes_text(result["total_bytes"] / found["handles"])
        rows.append((pair.WAYS[way].shown, f"{found['handles']} handle(s) of {size}"))
        for name, one in found["results"].items():
            shown = "SocketTransferBackend" if name == "socket" else f"sage_kvt over {name}"
            ratio = "" if name == "socket" else f", {one['times_socket']:.1f} times SocketTransferBackend"
            rows.append((shown, f"{one['gbytes_per_s']:.2f} GB/s, {one['median_s'] * 1e3:.0f} ms{ratio}"))
    for name, shown in (("memcpy", "limit: one copy in memory"), ("loopback", "limit: one TCP connection")):
        one = result["limits"][name]
        rows.append((shown, f"{one['gbytes_per_s']:.2f} GB/s, {one['median_s'] * 1e3:.0f} ms"))
    return rows


def _figures(nbytes: int, times: Sequence[float]) -> dict[str, float]:
    return {"median_s": median(times), "gbytes_per_s": nbytes / median(times) / 1e9}


def _measure_limits(
    sender: subprocess.Popen[str], limits: dict[str, list[float]], total: int, repeats: int
) -> None:
    source, target = pair.content(0, total), np.zeros(total, dtype=np.uint8)
    whole = [np.array([[one.ctypes.data, total]], dtype=np.uint64) for one in (target, source)]
    for _ in range(repeats):
        limits["memcpy"].append(_data_plane.measure_memcpy(*whole))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            _tell(sender, f"loopback {listener.getsockname()[1]}")
            limits["loopback"].append(pair.loopback_receive(listener, target))
        _expect(sender, "sent")


def _rounds(
    sender: subprocess.Popen[str], made: dict[str, Any], way: str, total: int, repeats: int
) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in made}
    count = pair.WAYS[way].handles
    buffers = [bytearray(total // count) for _ in range(count)]
    for index in range(repeats + 1):  # the first warms up
        progress.print(f"{way}: round {index} of {repeats}")
        for name, backend in made.items():
            took = _once(sender, backend, f"{name} {way} {index}", pair.WAYS[way], buffers, index)
            if index:
                times[name].append(took)
    results = {}
    for name, one in times.items():
        ratios = [theirs / ours for theirs, ours in zip(times["socket"], one, strict=True)]
        results[name] = _figures(total, one) | {"times_socket": median(ratios)}
    return {"handles": count, "results": results}


def _once(
    sender: subprocess.Popen[str],
    backend: Any,
    order: str,
    way: pair.Way,
    buffers: Sequence[bytearray],
    index: int,
) -> float:
    _tell(sender, order)
    expected = pair.content(index, sum(map(len, buffers)))
    pair.fill(buffers, np.bitwise_not(expected))  # wrong everywhere
    _expect(sender, "filled")
    begun = time.perf_counter()
    _tell(sender, "go")
    pair.move(backend, buffers, way)
    took = time.perf_counter() - begun
    _expect(sender, "")
    if not np.array_equal(np.concatenate([np.frombuffer(one, dtype=np.uint8) for one in buffers]), expected):
        raise BenchError(f"{order}: other bytes arrived than were sent")
    return took


def _tell(sender: subprocess.Popen[str], line: str) -> None:
    assert sender.stdin is not None
    sender.stdin.write(line + "\n")
    sender.stdin.flush()


def _expect(sender: subprocess.Popen[str], word: str) -> None:
    """The sender's next line, which is ``word``, or anything if that is empty."""
    assert sender.stdout is not None
    line = sender.stdout.readline()
    if not line or (word and line.strip() != word):
        raise BenchError(
            f"the sending process said {line.strip() or 'nothing'!r}, not {word!r}; see its errors above"
        )
