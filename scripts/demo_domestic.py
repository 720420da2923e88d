# SPDX-License-Identifier: Apache-2.0
"""Probe → plan → 1 GiB of paged KV between two EMULATED accelerators, fp8 on the wire, checked bit by bit.

Two processes, each with an emulated card behind the vendor's own C ABI; bytes cross by tcp, as
between two nodes, or with ``--backend pcie`` from device to device, where one vendor's are on both sides; ``way`` says
which it was. The emulated copy engines run at ``--dma-gbytes-per-s``.

    python -m scripts.demo_domestic --vendor ascend
    python -m scripts.demo_domestic --vendor ascend --to cambricon --json
    python -m scripts.demo_domestic --all-pairs --gib 0.25
    python -m scripts.demo_domestic --vendor hygon --backend pcie --target-dtype auto
    python -m scripts.demo_domestic --all-pairs --backend pcie --gib 0.03
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import secrets
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.console import emit, progress
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.hardware.probing.accelerator_descriptor import AcceleratorDescriptor
from sage_kv_connector.hardware.probing.profile import HardwareProfile, Recommendation
from sage_kv_connector.hardware.probing.recording import RecordedMachine
from sage_kv_connector.hardware.report.recommend import recommend
from sage_kv_connector.hardware.report.topology import probe
from sage_kv_connector.vendors import VENDORS
from sage_kv_connector.vendors.emulator.settings import DIRECTIONS
from scripts.domestic_side import BLOCK, BYTES_PER_TOKEN, SideOptions, serve

#: Recorded machines, as `sage-kvt probe --record` makes them; a vendor's begin with its name.
RECORDINGS = Path(__file__).parents[1] / "tests" / "hardware" / "recordings"
START_TIMEOUT_S = 120.0


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--vendor", choices=VENDORS, default="ascend", help="of the prefill device")
    words.add_argument("--to", choices=VENDORS, help="of the decode device; the same one by default")
    words.add_argument("--all-pairs", action="store_true", help="every ordered pair of vendors")
    words.add_argument("--gib", type=float, default=1.0, help="KV to move")
    words.add_argument("--target-dtype", default="fp8_e4m3", help="dtype on the wire")
    words.add_argument(
        "--backend", default="tcp", choices=("tcp", "shm", "pcie"), help="what carries the bytes"
    )
    words.add_argument("--dma-gbytes-per-s", type=float, default=0.7, help="of the emulated copy engines")
    words.add_argument("--json", action="store_true")
    given = words.parse_args()
    pairs = [(given.vendor, given.to or given.vendor)]
    if given.all_pairs:
        pairs = list(itertools.product(VENDORS, repeat=2))
    reports = []
    for source, target in pairs:
        progress.print(f"{source} to {target}: two emulated devices, {given.gib:g} GiB")
        reports.append(hand_over(source, target, given))
        if not given.json:
            emit(reports[-1], as_json=False, title=f"{source} to {target}, emulated", rows=rows(reports[-1]))
    if given.json:
        json.dump(reports[0] if len(reports) == 1 else {"pairs": reports}, sys.stdout)
        print()
    return 0 if all(report["bit_identical"] for report in reports) else 1


def hand_over(source: str, target: str, given: argparse.Namespace) -> dict[str, Any]:
    """One transfer between fresh processes; the report."""
    tokens = max(BLOCK, int(given.gib * 2**30) // BYTES_PER_TOKEN // BLOCK * BLOCK)
    config = {"backend": given.backend, "secret": secrets.token_urlsafe(16), "host": "127.0.0.1"}
    config |= {"deadline_s": 600.0, "lease_s": 600.0, "target_dtype": given.target_dtype}
    probed: dict[str, HardwareProfile] = {}
    recommended: dict[str, Recommendation] = {}
    pipes: dict[str, Connection] = {}
    processes = []
    context = multiprocessing.get_context("spawn")
    try:
        for role, vendor in (("prefill", source), ("decode", target)):
            profile = probed[role] = probe(RecordedMachine(min(RECORDINGS.glob(f"{vendor}*"))))
            recommended[role] = recommend(profile)
            chosen = {**recommended[role].config, **config}
            KVTransportConfig.load(chosen)
            settings = emulated(profile, tokens * BYTES_PER_TOKEN)
            pipes[role], theirs = context.Pipe()
            options = SideOptions(role, vendor, settings, chosen, tokens)
            processes.append(context.Process(target=serve, args=(theirs, options), daemon=True))
            processes[-1].start()
        about = {role: _answer(pipe, START_TIMEOUT_S) for role, pipe in pipes.items()}
        for role in pipes:  # filling went as fast as memory
            rate = given.dma_gbytes_per_s
            _ask(pipes[role], "rates", {f"{way}_gbytes_per_s": rate for way in DIRECTIONS})
        before = {role: _ask(pipe, "counters") for role, pipe in pipes.items()}
        _ask(pipes["prefill"], "offer", "demo")
        peer = (about["prefill"][0], 0, about["prefill"][1])
        outcome, seconds = _ask(pipes["decode"], "fetch", peer, "demo", timeout_s=650.0)
        after = {role: _ask(pipe, "counters") for role, pipe in pipes.items()}
        moved = {
            role: {name: after[role][name] - before[role].get(name, 0) for name in after[role]}
            for role in after
        }
        for role in pipes:
            _ask(pipes[role], "rates", {f"{way}_gbytes_per_s": 0.0 for way in DIRECTIONS})
        wrong = _ask(pipes["decode"], "check", timeout_s=300.0) if outcome.ok else -1
        for pipe in pipes.values():
            pipe.send(("quit",))
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            process.kill()
    return report(probed, recommended, about, outcome, seconds, moved, wrong, tokens, given)


def emulated(profile: HardwareProfile, kv_bytes: int) -> dict[str, Any]:
    """Settings of an emulated machine with what the first device's descriptor says of DMA."""
    device = profile.devices[0].descriptor
    return {
        "devices": 1,
        "memory_bytes": kv_bytes + (256 << 20),
        "dma_alignment_bytes": _fact(device, "dma_alignment_bytes") or 1,
        "max_transfer_bytes": _fact(device, "max_transfer_bytes") or 0,
        "pinned_only": True,
    }


def _fact(device: AcceleratorDescriptor | None, name: str) -> int | None:
    fact = getattr(device, name) if device is not None else None
    return None if fact is None else int(fact.value)


def report(
    probed: dict[str, HardwareProfile],
    recommended: dict[str, Recommendation],
    about: dict[str, Any],
    outcome: Outcome,
    seconds: float,
    moved: dict[str, dict[str, int]],
    wrong: int,
    tokens: int,
    given: argparse.Namespace,
) -> dict[str, Any]:
    """``stages``: bytes and busy seconds of each; ``overlap``: busy seconds of all by elapsed seconds.

    ``asked``: calls that copy, copies and bytes of each side's machine, by direction; ``launches``: of its kernels.
    """
    kv = tokens * BYTES_PER_TOKEN
    wire = outcome.stats.nbytes if outcome.stats else 0
    prefill, decode = moved["prefill"], moved["decode"]
    launched = {way: side[f"{way}_launches"] for way, side in (("d2h", prefill), ("h2d", decode))}
    if decode.get("d2d_launches"):
        launched["h2d"] = decode["d2d_launches"]
    crossed = decode.get("d2d_bytes") or decode.get("d2d_read_bytes")
    if crossed:
        stages = {"device to device": _stage(crossed, decode["d2d_ns"])}
    else:
        stages = {
            "device to host": _stage(prefill["d2h_bytes"], prefill["d2h_ns"]),
            "encode": _stage(kv, prefill["encode_ns"]),
            "wire": _stage(wire, prefill["posting_ns"]),
            "decode": _stage(kv, decode["decode_ns"]),
            "host to device": _stage(decode["h2d_bytes"], decode["h2d_ns"]),
        }
    # What kernels convert is part of the lane's work.
    for name, way in (("encode", "d2h"), ("decode", "h2d")):
        if launched[way]:
            stages.pop(name, None)
    busy = {name: stage["busy_s"] for name, stage in stages.items()}
    copying = [name for name in stages if "device" in name]
    # What each takes by itself: a copy at its engine's rate, a conversion its threads' time, and a lane that launches
    # kernels its own, since an emulated device's are as fast as a CPU.
    paced = {
        "device to host": not launched["d2h"],
        "host to device": not launched["h2d"],
        "device to device": not decode.get("d2d_launches"),
    }
    alone = {
        name: stage["bytes"] / given.dma_gbytes_per_s / 1e9 if paced.get(name) else busy[name]
        for name, stage in stages.items()
        if name != "wire"
    }
    return {
        "emulated": True,
        "from": about["prefill"][2],
        "to": about["decode"][2],
        "chips": {role: profile.devices[0].chip for role, profile in probed.items()},
        "recommended": {role: one.model_dump(mode="json") for role, one in recommended.items()},
        "plan": {
            "backend": given.backend,
            "way": f"{outcome.stats.backend}, {outcome.stats.mode}" if outcome.stats else None,
            "wire_dtype": outcome.stats.wire_dtype if outcome.stats else None,
            "dma_gbytes_per_s": given.dma_gbytes_per_s,
        },
        "ok": outcome.ok,
        "error": outcome.error,
        "kv_bytes": kv,
        "wire_bytes": wire,
        "elapsed_s": seconds,
        "launches": launched,
        "asked": {role: _asked(counters) for role, counters in moved.items()},
        "stages": stages,
        "overlap": sum(busy.values()) / seconds,
        "slowest_stage": max(alone, key=alone.__getitem__),
        "to_slowest_stage": seconds / max(alone.values()),
        "stalls_s": {name: seconds - busy[name] for name in copying},
        "wrong_bytes": wrong,
        "bit_identical": wrong == 0,
    }


def rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    found = [
        ("from", f"{report['chips']['prefill']}: {report['from']}"),
        ("to", f"{report['chips']['decode']}: {report['to']}"),
        ("plan", f"{report['plan']['wire_dtype']} over {report['plan']['way']}, copies at "
                 f"{report['plan']['dma_gbytes_per_s']:g} GB/s (emulated)"),
    ]  # fmt: skip
    if not report["ok"]:
        return [*found, ("FAILED", report["error"])]
    for name, stage in report["stages"].items():
        found.append((name, f"{stage['bytes'] / 2**20:.0f} MiB, busy {stage['busy_s']:.2f} s"))
    for role, ways in report["asked"].items():
        calls = [f"{each['copies']} copies {way} in {each['calls']} calls" for way, each in ways.items()]
        launches = report["launches"]["d2h" if role == "prefill" else "h2d"]
        calls += [f"{launches} launches of its kernels"] if launches else []
        found.append((f"{role}'s device", ", ".join(calls) or "asked for no copy"))
    return [
        *found,
        ("elapsed", f"{report['elapsed_s']:.2f} s, {report['to_slowest_stage']:.2f} of the slowest stage "
                    f"({report['slowest_stage']}); stages overlap {report['overlap']:.1f} times"),
        ("stalls", ", ".join(f"{name} {s:.2f} s" for name, s in report["stalls_s"].items())),
        ("bits", "all as the reference says" if report["bit_identical"] else f"{report['wrong_bytes']} WRONG BYTES"),
    ]  # fmt: skip


def _asked(counters: dict[str, int]) -> dict[str, dict[str, int]]:
    """What a side's machine was asked for, by direction, where that is anything."""
    ways = {
        way: {name: counters[f"asked_{way}_{name}"] for name in ("calls", "copies", "bytes")}
        for way in DIRECTIONS
    }
    return {way: each for way, each in ways.items() if each["calls"]}


def _stage(nbytes: int, nanoseconds: int) -> dict[str, float]:
    return {"bytes": nbytes, "busy_s": nanoseconds / 1e9}


def _ask(pipe: Connection, *order: Any, timeout_s: float = 60.0) -> Any:
    pipe.send(order)
    return _answer(pipe, timeout_s)


def _answer(pipe: Connection, timeout_s: float) -> Any:
    if not pipe.poll(timeout_s):
        raise SystemExit(f"a side of the demo did not answer within {timeout_s:.0f} s")
    return pipe.recv()


if __name__ == "__main__":
    sys.exit(main())
