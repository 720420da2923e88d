# SPDX-License-Identifier: Apache-2.0
"""What a hand-over asks of two EMULATED devices: calls, copies and bytes, whatever their speed.

Two processes, each with an emulated device behind the vendor's own C ABI. The decode side checks what
landed against the same conversion by the CPU's kernels in host memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sage_kv_connector.bench.device_cache import CacheShape
from sage_kv_connector.bench.device_pair import ROLES, Case, DevicePair
from sage_kv_connector.console import progress
from sage_kv_connector.vendors.emulator.settings import DIRECTIONS

TOKENS, LAYERS, PAGE = 1024, 80, 16


CASES = (
    Case("direct", "pcie", PAGE, "auto"),
    Case("direct 16 to 64", "pcie", 64, "auto"),
    Case("direct fp8", "pcie", PAGE, "fp8_e4m3"),
    Case("direct int4", "pcie", PAGE, "int4"),
    Case("staged equal", "tcp", PAGE, "auto"),
    Case("staged 16 to 64", "tcp", 64, "auto"),
    Case("staged fp8", "tcp", PAGE, "fp8_e4m3"),
    Case("staged int4", "tcp", PAGE, "int4"),
)


def count_device(
    vendor: str, cases: Sequence[Case] = CASES, tokens: int = TOKENS, layers: int = LAYERS
) -> dict[str, Any]:
    """``cases``: of each side the calls, copies and bytes by direction, the parts and the launches; ``mode``: its way.

    Raises HandOverFailed.
    """
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
        found["cases"][case.name] = one = _counted(vendor, source, case)
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
        yield (
            f"{name}, wire",
            f"{case['wire_bytes'] / 1e6:.1f} MB of {case['wire_dtype']}, {case['mode']}",
        )
    yield "bytes", "equal" if result["verified"] else "WRONG"


def _counted(vendor: str, source: CacheShape, case: Case) -> dict[str, Any]:
    with DevicePair(vendor, source, case, emulated=True) as pair:
        before = {role: pair.ask(role, "counts") for role in ROLES}
        stats, _ = pair.hand_over()
        after = {role: pair.ask(role, "counts") for role in ROLES}
        wrong = pair.ask("decode", "check")
    return {
        "backend": case.backend,
        "mode": stats.mode,
        "wire_dtype": stats.wire_dtype,
        "wire_bytes": stats.nbytes,
        **{role: _asked(before[role], after[role]) for role in ROLES},
        "wrong_bytes": wrong,
        "runtime": pair.runtime,
    }


def _asked(before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> dict[str, Any]:
    change = {
        way: {name: value - before[way][name] for name, value in each.items()} for way, each in after.items()
    }
    sums = {name: sum(change.pop(name).values()) for name in ("parts", "launches")}
    return sums | change
