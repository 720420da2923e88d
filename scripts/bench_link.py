# SPDX-License-Identifier: Apache-2.0
"""A 32K hand-over across a rate-limited link, for each dtype on the wire.

Two network namespaces, a veth pair and ``tc … tbf`` from prefill to decode; two processes
with our engine and a KV cache of 16 KiB a token (8 layers, 4 heads x 128, bf16), no
inference engine. Printed for each dtype: bytes on the wire, time, the share of the link's
rate that payload bytes got, and that of a plain socket sending as many bytes. Needs root
and iproute2. ``python -m scripts.bench_link --gbit 1 --json``
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import socket
import subprocess
import sys
import time
from typing import Any

import numpy as np

from sage_kv_connector.bench.ab.links import DECODE, PREFILL, two_hosts
from sage_kv_connector.config import SECRET_ENV, KVTransportConfig
from sage_kv_connector.contract.cache_view import CanonicalPlane, KVCacheView, group_view
from sage_kv_connector.contract.element_order import packed_cpu_planes
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.engine.core import EngineCore
from sage_kv_connector.engine.pages.paged import PagedSource
from sage_kv_connector.engine.pages.target import PagesTarget, one_run
from sage_kv_connector.engine.transfer.subscription import Wanted

LAYERS, HEADS, DIM, PAGE = 8, 4, 128, 128
DTYPES = ("auto", "fp8_e4m3", "int4")


class _Side:
    """An engine and its cache; page ``i`` of the request is page ``i`` of the cache."""

    def __init__(self, host: str, tokens: int, dtype: str, security: str, seed: int) -> None:
        self.pages = -(-tokens // PAGE)
        shape = (self.pages, HEADS, PAGE, 2 * DIM)
        block = np.random.default_rng(seed).normal(size=shape[1:]).astype(np.float32)
        bits = (block.view(np.uint32) >> 16).astype(np.uint16) if seed else np.zeros(shape[1:], np.uint16)
        self.cache = [np.broadcast_to(bits, shape).copy() for _ in range(LAYERS)]
        orders = packed_cpu_planes("cpu-vec", 2, PAGE, DIM)
        assert orders is not None
        canonical = (CanonicalPlane("k", DIM, 0, orders[0]), CanonicalPlane("v", DIM, 0, orders[1]))
        axes = ("page", "head", "token", "content")
        layers = [(f"layers.{i}", [("kv", tensor, axes)]) for i, tensor in enumerate(self.cache)]
        group = group_view("fullattention", PAGE, self.pages, layers, heads=HEADS, canonical=canonical)
        self.view = KVCacheView((group,))
        schema = KVCacheSchema(
            "bench", "m", "bf16", LAYERS, HEADS, 0, HEADS, DIM, (group.schema(),), packing="cpu-vec"
        )
        config = KVTransportConfig.load(
            {
                "backend": "tcp",
                "host": host,
                "target_dtype": dtype,
                "deadline_s": 300.0,
                "security": security,
            }
        )
        self.core = EngineCore(config, schema=schema)
        self.core.register_memory(self.view.extents())
        self.core.start()


def prefill(tokens: int, levels: list[str]) -> None:
    """Offers transfers named on stdin; first sends plain bytes to whoever asks on a socket of its own."""
    sides = {level: _Side(PREFILL, tokens, "auto", level, 1) for level in levels}
    listener = socket.create_server((PREFILL, 0))
    about = {
        "engines": {level: (side.core.engine_id, 0, side.core.addresses) for level, side in sides.items()},
        "plain": listener.getsockname()[1],
    }
    print(json.dumps(about), flush=True)
    released: queue.Queue[Outcome] = queue.Queue()
    for line in sys.stdin:
        word, argument, *level = line.split()
        if word == "plain":
            connection, _ = listener.accept()
            with connection:
                data = memoryview(sides[levels[0]].cache[0]).cast("B")
                left = int(argument)
                while left:
                    left -= connection.send(data[: min(left, 4 << 20)])
        else:
            side = sides[level[0]]
            source = PagedSource(side.view)
            source.set_pages(0, np.arange(side.pages))
            source.advance(0, slice(None), side.pages)
            side.core.offer(argument, source, released.put)
            side.core.finish(argument)
        print("ready", flush=True)
    for side in sides.values():
        side.core.close()


def decode(tokens: int, about: dict[str, Any]) -> None:
    """Reads ``fetch DTYPE LEVEL ID`` or ``plain BYTES`` from stdin and prints what it took."""
    sides: dict[str, _Side] = {}
    for line in sys.stdin:
        word, *arguments = line.split()
        if word == "plain":
            left = int(arguments[0])
            buffer = bytearray(4 << 20)
            begun = time.perf_counter()
            with socket.create_connection((PREFILL, about["plain"])) as connection:
                while left:
                    left -= connection.recv_into(buffer, min(left, len(buffer)))
            print(json.dumps({"seconds": time.perf_counter() - begun}), flush=True)
            continue
        dtype, level, transfer_id = arguments
        kind = f"{dtype} {level}"
        if kind not in sides:
            sides[kind] = _Side(DECODE, tokens, dtype, level, 0)
        side = sides[kind]
        side.cache[-1][:] = 0
        ids = np.arange(side.pages)
        wanted = Wanted(
            transfer_id,
            PagesTarget(side.view, (one_run(0, 0, ids, range(tokens)),)),
            True,
            300.0,
        )
        outcomes: queue.Queue[Outcome] = queue.Queue()
        begun = time.perf_counter()
        engine_id, rank, addresses = about["engines"][level]
        side.core.subscribe(PeerAddress(engine_id, rank, tuple(addresses)), wanted, outcomes.put)
        outcome = outcomes.get(timeout=400)
        seconds = time.perf_counter() - begun
        stats = outcome.stats
        if stats is None:
            raise SystemExit(f"hand-over with {dtype} failed: {outcome.error}")
        checked = float((side.cache[-1] != 0).mean())
        print(json.dumps({"seconds": seconds, "nbytes": stats.nbytes, "filled": checked}), flush=True)
    for side in sides.values():
        side.core.close()


def measure(gbit: float, tokens: int, repeats: int, security: list[str]) -> dict[str, Any]:
    levels = ["none", *security]
    kinds = [("auto", level) for level in levels] if security else [(dtype, "none") for dtype in DTYPES]
    with two_hosts(gbit * 1000) as hosts:
        base = [sys.executable, "-m", "scripts.bench_link", "--tokens", str(tokens)]
        base += ["--security", ",".join(levels)]
        env = {**os.environ, SECRET_ENV: "bench-link"}
        pipes: dict[str, Any] = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "text": True,
            "env": env,
        }
        source = subprocess.Popen([*hosts.prefill.enter, *base, "--role", "prefill"], **pipes)
        about = source.stdout.readline()
        target = subprocess.Popen([*hosts.decode.enter, *base, "--role", "decode", "--about", about], **pipes)
        rows: dict[str, list[dict[str, float]]] = {}
        plain: dict[str, list[float]] = {}
        try:
            for turn in range(repeats):
                for dtype, level in kinds:
                    name = f"{dtype}-{level}-{turn}"
                    print(f"hand-over {name} at {gbit} Gb/s", file=sys.stderr)
                    _say(source, f"offer {name} {level}")
                    source.stdout.readline()
                    row = _ask(target, f"fetch {dtype} {level} {name}")
                    if row["filled"] < 0.9:
                        raise SystemExit(
                            f"{dtype}: only {row['filled']:.3f} of the last layer's elements were written"
                        )
                    kind = "bf16" if dtype == "auto" else dtype
                    kind += f", {level}" if security else ""
                    rows.setdefault(kind, []).append(row)
                    _say(source, f"plain {int(row['nbytes'])}")
                    plain.setdefault(kind, []).append(_ask(target, f"plain {int(row['nbytes'])}")["seconds"])
                    source.stdout.readline()
        finally:
            for process in (source, target):
                process.stdin.close()
                process.wait(30)
    results = {}
    for dtype, found in rows.items():
        seconds = float(np.median([row["seconds"] for row in found]))
        raw = float(np.median(plain[dtype]))
        nbytes = found[0]["nbytes"]
        results[dtype] = {
            "wire_bytes": int(nbytes),
            "seconds": round(seconds, 3),
            "plain_socket_seconds": round(raw, 3),
            "utilization": round(nbytes * 8 / seconds / gbit / 1e9, 3),
            "plain_socket_utilization": round(nbytes * 8 / raw / gbit / 1e9, 3),
            "ratio_to_plain_socket": round(raw / seconds, 3),
        }
    for level in security:
        pairs = zip(rows["bf16, none"], rows[f"bf16, {level}"], strict=True)
        ratio = float(np.median([bare["seconds"] / one["seconds"] for bare, one in pairs]))
        results[f"bf16, {level}"]["ratio_to_none"] = round(ratio, 3)
    return {"gbit_per_s": gbit, "tokens": tokens, "repeats": repeats, "results": results}


def _say(process: Any, line: str) -> None:
    process.stdin.write(line + "\n")
    process.stdin.flush()


def _ask(process: Any, line: str) -> dict[str, float]:
    _say(process, line)
    answer = process.stdout.readline()
    if not answer:
        raise SystemExit("the decode side ended")
    found: dict[str, float] = json.loads(answer)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gbit", type=float, default=1.0, help="rate of the link")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--security", default="", help="in bf16 only: none, and any of authenticated,encrypted"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--role", choices=("prefill", "decode"), help=argparse.SUPPRESS)
    parser.add_argument("--about", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.role == "prefill":
        prefill(given.tokens, given.security.split(","))
    elif given.role == "decode":
        decode(given.tokens, json.loads(given.about))
    else:
        result = measure(given.gbit, given.tokens, given.repeats, [w for w in given.security.split(",") if w])
        if given.json:
            print(json.dumps(result))
        else:
            for dtype, row in result["results"].items():
                print(
                    f"{dtype:>19}: {row['wire_bytes'] / 1e6:.0f} MB in {row['seconds']:.2f} s, "
                    f"{row['utilization']:.3f} of the link (plain socket {row['plain_socket_utilization']:.3f})"
                    + (f", {row['ratio_to_none']:.3f} of none" if "ratio_to_none" in row else "")
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
