# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench sage``: sageLLM's KVTransferEngine over its SocketTransferBackend and over ours, in one run.

Two processes hold one backend of each contender; rounds go through all of them. A figure is the time
from "go" to the last byte in the receiver's buffer, as a median over rounds; ratios are medians of
the ratios within each round. Every byte of every round is compared, outside of the time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from sage_kv_connector.cli import bench_sage_pair as pair
from sage_kv_connector.cli.report import bytes_text, progress
from sage_kv_connector.cli.vllm_processes import free_port

NAMES = ("socket", "tcp", "shm")
#: Way → in how many handles it moves everything.
WAYS = {"engine": 1, "pipeline": 64}


class BenchError(RuntimeError):
    """The other process ended, or bytes differ; the message says which."""


def bench_sage(total_bytes: int, repeats: int) -> dict[str, Any]:
    """Run it. Raises BenchError, and ImportError without isagellm-kv-cache."""
    import sagellm_kv_cache.transfer  # noqa: F401  — say at once that it is missing

    ports = {name: [free_port(), free_port()] for name in NAMES}
    sender = subprocess.Popen(
        [
            sys.executable, "-m", pair.__name__,
            json.dumps(ports), json.dumps(NAMES), str(total_bytes),
        ],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    made: dict[str, Any] = {}
    try:
        made = pair.contenders(pair.RECEIVER, ports, NAMES)
        _expect(sender, "ready")
        ways = {way: _rounds(sender, made, way, count, total_bytes, repeats) for way, count in WAYS.items()}
    finally:
        pair.close(made)
        try:
            sender.communicate("quit\n", timeout=10)
        except (subprocess.TimeoutExpired, BrokenPipeError, ValueError):
            sender.kill()
            sender.wait()
    return {"total_bytes": total_bytes, "repeats": repeats, "ways": ways, "verified": True}


def sage_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The result for people."""
    rows = []
    for way, found in result["ways"].items():
        size = bytes_text(result["total_bytes"] / found["handles"])
        rows.append((f"KVTransfer{way.capitalize()}", f"{found['handles']} handle(s) of {size}"))
        for name, one in found["results"].items():
            shown = "SocketTransferBackend" if name == "socket" else f"sage_kvt over {name}"
            ratio = "" if name == "socket" else f", {one['times_socket']:.1f} times SocketTransferBackend"
            rows.append((shown, f"{one['gbytes_per_s']:.2f} GB/s, {one['median_s'] * 1e3:.0f} ms{ratio}"))
    return rows


def _rounds(
    sender: subprocess.Popen[str], made: dict[str, Any], way: str, count: int, total: int, repeats: int
) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in made}
    buffers = [bytearray(total // count) for _ in range(count)]
    for index in range(repeats + 1):  # the first warms up
        progress.print(f"{way}: round {index} of {repeats}")
        for name, backend in made.items():
            took = _once(sender, backend, f"{name} {way} {count} {index}", way, buffers, index)
            if index:
                times[name].append(took)
    results = {}
    for name, one in times.items():
        ratios = [theirs / ours for theirs, ours in zip(times["socket"], one, strict=True)]
        results[name] = {
            "median_s": median(one),
            "gbytes_per_s": total / median(one) / 1e9,
            "times_socket": median(ratios),
        }
    return {"handles": count, "results": results}


def _once(
    sender: subprocess.Popen[str],
    backend: Any,
    order: str,
    way: str,
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
