# SPDX-License-Identifier: Apache-2.0
"""What a hand-over asks of two EMULATED devices: calls, copies and bytes, whatever their speed.

Two processes, each with an emulated device behind the vendor's own C ABI. The decode side checks what
landed against the same conversion by the CPU's kernels in host memory.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from sage_kv_connector.bench.device_cache import TIMEOUT_S, CacheShape, serve
from sage_kv_connector.console import progress
from sage_kv_connector.vendors.emulator.settings import DIRECTIONS

TOKENS, LAYERS, PAGE = 1024, 80, 16


class Case(NamedTuple):
    """``page``: tokens of a page of the decode side; the prefill side's has ``PAGE``."""

    name: str
    backend: str
    page: int
    target_dtype: str


CASES = (
    Case("direct", "pcie", PAGE, "auto"),
    Case("staged equal", "tcp", PAGE, "auto"),
    Case("staged 16 to 64", "tcp", 64, "auto"),
    Case("staged fp8", "tcp", PAGE, "fp8_e4m3"),
    Case("staged int4", "tcp", PAGE, "int4"),
)


class CountFailed(RuntimeError):
    """A hand-over of the bench did not end well; the text says why."""


def count_device(
    vendor: str, cases: Sequence[Case] = CASES, tokens: int = TOKENS, layers: int = LAYERS
) -> dict[str, Any]:
    """``cases``: of each side the calls, copies and bytes by direction, and the parts. Raises CountFailed."""
    source = CacheShape(tokens, layers, PAGE)
    found: dict[str, Any] = {
        "vendor": vendor,
        "emulated": True,
        "tokens": tokens,
        "layers": layers,
        "kv_bytes": layers * source.layer_bytes,
        "cases": {},
    }
    for case in cases:
        progress.print(f"{vendor} (emulated): {case.name}")
        found["cases"][case.name] = one = _hand_over(vendor, source, case)
        found["runtime"] = one.pop("runtime")
    found["verified"] = all(one["wrong_bytes"] == 0 for one in found["cases"].values())
    return found


def count_rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The result as a table for people."""
    yield "runtime", f"{result['runtime']} (emulated)"
    yield "KV", f"{result['kv_bytes'] >> 20} MiB: {result['tokens']} tokens, {result['layers']} layers"
    for name, case in result["cases"].items():
        for role in ("prefill", "decode"):
            side = case[role]
            asked = [
                f"{way} {side[way]['calls']} calls, {side[way]['copies']} copies, {side[way]['bytes'] / 1e6:.1f} MB"
                for way in DIRECTIONS
                if side[way]["calls"]
            ]
            begun = f"{side['parts']} parts, {side['launches']} launches"
            yield f"{name}, {role}", "; ".join((begun, *asked))
        yield f"{name}, wire", f"{case['wire_bytes'] / 1e6:.1f} MB of {case['wire_dtype']}"
    yield "bytes", "equal" if result["verified"] else "WRONG"


def _hand_over(vendor: str, source: CacheShape, case: Case) -> dict[str, Any]:
    config = {
        "backend": case.backend,
        "host": "127.0.0.1",
        "target_dtype": case.target_dtype,
        "deadline_s": TIMEOUT_S,
        "lease_s": TIMEOUT_S,
    }
    shapes = {"prefill": source, "decode": source._replace(page=case.page)}
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    try:
        for role, shape in shapes.items():
            pipes[role], theirs = context.Pipe()
            arguments = (theirs, role, vendor, shape, source, config)
            processes.append(context.Process(target=serve, args=arguments, daemon=True))
            processes[-1].start()
            theirs.close()
        about = {role: _answer(role, pipe) for role, pipe in pipes.items()}
        before = {role: _ask(role, pipe, "counts") for role, pipe in pipes.items()}
        _ask("prefill", pipes["prefill"], "offer", case.name)
        peer = (about["prefill"][0], 0, about["prefill"][1])
        outcome = _ask("decode", pipes["decode"], "fetch", peer, case.name)
        if not outcome.ok:
            raise CountFailed(f"{case.name}: {outcome.error}")
        after = {role: _ask(role, pipe, "counts") for role, pipe in pipes.items()}
        wrong = _ask("decode", pipes["decode"], "check")
        for pipe in pipes.values():
            pipe.send(("quit",))
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            process.kill()
    return {
        "backend": case.backend,
        "wire_dtype": outcome.stats.wire_dtype,
        "wire_bytes": outcome.stats.nbytes,
        **{role: _asked(before[role], after[role]) for role in shapes},
        "wrong_bytes": wrong,
        "runtime": about["prefill"][2],
    }


def _asked(before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> dict[str, Any]:
    change = {
        way: {name: value - before[way][name] for name, value in each.items()} for way, each in after.items()
    }
    sums = {name: sum(change.pop(name).values()) for name in ("parts", "launches")}
    return sums | change


def _ask(role: str, pipe: Connection, *order: Any) -> Any:
    pipe.send(order)
    return _answer(role, pipe)


def _answer(role: str, pipe: Connection) -> Any:
    try:
        if pipe.poll(TIMEOUT_S):
            return pipe.recv()
    except EOFError:
        raise CountFailed(f"the {role} side ended") from None
    raise CountFailed(f"the {role} side did not answer within {TIMEOUT_S:.0f} s")
