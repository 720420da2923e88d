# SPDX-License-Identifier: Apache-2.0
"""Whether every metric says what happened, on pairs of real servers (docs/ops.md).

    make check-telemetry ARGS="[--engine vllm|sglang] [--only TEXT] [--fault NAME] [--json] [--logs FOLDER]"

A load whose bytes are counted as it is sent, then faults whose codes are known; after each, both servers' /metrics and
the exporter are compared with what was counted. Then the same with decode started again, and with vLLM's two API
servers, over which KV is converted. SGLang's phases run in its own environment.
JSON: ``bytes_equal``, ``failures_equal``, ``gauges_equal``; ``stages_gap``: the largest share by which stages differ
from the whole; ``promtool``: whether it finds nothing wrong, null where there is none (``promtool_missing`` says so);
``overhead``: what ``sage-kvt bench telemetry`` measured, in its short form; ``engines``: rows of what was expected and
what was said; ``not_moved``: metrics that this load can't move, and why; ``wrong``: a sentence each, also
``wrong_by_check``.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from integration_tests import telemetry_sglang, telemetry_vllm
from integration_tests.telemetry_checks import has_promtool, promtool_of_rules
from integration_tests.telemetry_phases import (
    CHECKS,
    PAIR,
    RESTARTED,
    TWO_API_SERVERS,
    Load,
    Verdict,
    judge_moved,
    lost,
    run_phase,
    run_restarted,
)
from sage_kv_connector.launch.process import ServerError, console_script, unwind_on_sigterm
from scripts.in_sglang import said_in_sglang

PHASES = {"vllm": (PAIR, RESTARTED, TWO_API_SERVERS), "sglang": (PAIR, RESTARTED)}
#: The short form: what it finds is printed, not judged.
OVERHEAD = (
    "bench", "telemetry", "--backends", "tcp", "--blocks", "65536", "--mib", "64", "--tokens", "1024",
    "--rounds", "7", "--json",
)  # fmt: skip
_NO_PEER_LIES = "only a peer that breaks the protocol moves it"
_TAKEN_UP = "only bytes of a transfer that was taken up again while they were under way move it"
NOT_MOVED = {
    "vllm": {
        "stale_chunks_total": _TAKEN_UP,
        "refused_chunks_total": _NO_PEER_LIES,
        "small_post_seconds": "no post of this load is that small",
        "stalls_total": "the link has room for this load on a quick machine",
        "conversions": "a conversion may be over between two readings",
        "staging_bytes": "it may be given back between two readings",
    },
    "sglang": {
        "stale_chunks_total": _TAKEN_UP,
        "refused_chunks_total": _NO_PEER_LIES,
        "forged_frames_total": "security=none shows checksums; vLLM's phase with two API servers has tags",
        "stalls_total": "the link has room for this load on a quick machine",
        "recomputed_tokens_total": "SGLang's decode can't compute a prompt",
        "conversion_seconds_total": "both caches are alike; vLLM's phase with two API servers converts",
        "converted_bytes_total": "both caches are alike; vLLM's phase with two API servers converts",
        "conversions": "both caches are alike; vLLM's phase with two API servers converts",
        "staging_bytes": "both caches are alike; vLLM's phase with two API servers converts",
        "loads": "vLLM's scheduler alone counts it",
        "on_offer": "vLLM's scheduler alone counts it",
        "hot_chunk_handovers": "SGLang tells its transfer classes no prompt",
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--engine", action="append", choices=list(PHASES), help="only this one")
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="phases whose name contains this: " + ", ".join(PHASES["vllm"]),
    )
    parser.add_argument(
        "--fault",
        action="append",
        default=[],
        choices=sorted({*telemetry_vllm.FAULTS, *telemetry_sglang.FAULTS}),
        help="only this one, of engines that have it; may be given again",
    )
    parser.add_argument("--no-overhead", action="store_true", help="don't measure what telemetry costs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    parser.add_argument("--logs", type=Path, help="a folder; the servers' logs and models stay there")
    given = parser.parse_args()
    random.seed(given.seed)
    asked = given.engine or list(PHASES)
    engines = [engine for engine in asked if any(given.only in phase for phase in PHASES[engine])]
    if not engines:
        parser.error(f"--only {given.only!r} is part of no phase; there are: {', '.join(PHASES['vllm'])}")
    result = together([verdict_on(engine, given) for engine in engines], engines)
    if not given.no_overhead:
        result["overhead"] = overhead()
    if given.json:
        print(json.dumps(result))
    else:
        print(shown(result))
    return 1 if result["wrong"] else 0


def verdict_on(engine: str, given: argparse.Namespace) -> dict[str, Any]:
    """Of one engine: rows, wrong (by check), not_moved, stages_gap."""
    if engine == "sglang" and find_spec("sglang") is None:
        return in_sglangs_environment(given)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) if given.logs is None else given.logs / engine
        scratch.mkdir(parents=True, exist_ok=True)
        verdict = Verdict(engine)
        chosen = [phase for phase in PHASES[engine] if given.only in phase]
        if engine == "sglang":
            on_sglang(verdict, scratch, chosen, given.fault)
        else:
            on_vllm(verdict, scratch, chosen, given.fault)
        if len(chosen) == len(PHASES[engine]) and not given.fault:
            judge_moved(verdict, NOT_MOVED[engine])
    return {
        "rows": verdict.rows,
        "wrong": verdict.wrong,
        "not_moved": verdict.not_moved,
        "stages_gap": verdict.stages_gap,
    }


def on_vllm(verdict: Verdict, scratch: Path, phases: list[str], faults: list[str]) -> None:
    from integration_tests.telemetry_vllm import vllm_load

    if {PAIR, RESTARTED} & set(phases):
        on_pair(verdict, vllm_load(scratch), phases, faults, ("prompt", "cut", "aborted"))
    if TWO_API_SERVERS in phases:
        options = {"target_dtype": "fp8_e4m3", "security": "authenticated"}
        with told(verdict, TWO_API_SERVERS), vllm_load(scratch, "--api-server-count", "2", **options) as load:
            chosen = faults or ("prompt", "secret", "flipped", "lease")
            run_phase(load, verdict, TWO_API_SERVERS, chosen, converted=True)


def on_sglang(verdict: Verdict, scratch: Path, phases: list[str], faults: list[str]) -> None:
    from integration_tests.telemetry_sglang import sglang_load

    on_pair(verdict, sglang_load(scratch), phases, faults, ("weights", "cut", "aborted"))


def on_pair(
    verdict: Verdict,
    servers: AbstractContextManager[Load],
    phases: list[str],
    faults: list[str],
    once_restarted: Sequence[str],
) -> None:
    """Both phases of one pair. ``once_restarted``: the faults after the restart, unless others are asked for."""
    with told(verdict, PAIR), servers as load:
        if PAIR in phases:
            run_phase(load, verdict, PAIR, faults)
        if RESTARTED in phases:
            with told(verdict, RESTARTED):
                run_restarted(load, verdict, faults or once_restarted)


@contextmanager
def told(verdict: Verdict, phase: str) -> Iterator[None]:
    """Say how it went; what ends a phase early is wrong, and the next one goes on."""
    begun, before = time.monotonic(), sum(map(len, verdict.wrong.values()))
    try:
        yield
    except (ServerError, AssertionError, OSError) as error:
        lost(verdict, phase, error)
    wrong = sum(map(len, verdict.wrong.values())) - before
    say(f"{verdict.engine}, {phase}: {wrong} wrong, {time.monotonic() - begun:.0f} s")


def in_sglangs_environment(given: argparse.Namespace) -> dict[str, Any]:
    faults = (word for fault in given.fault for word in ("--fault", fault))
    said = said_in_sglang("scripts.check_telemetry", given, "--engine", "sglang", "--no-overhead", *faults)
    return {
        "rows": said["engines"],
        "wrong": said["wrong_by_check"],
        "not_moved": said["not_moved"].get("sglang", {}),
        "stages_gap": said["stages_gap"],
    }


def together(found: list[dict[str, Any]], engines: list[str]) -> dict[str, Any]:
    wrong = {check: [line for one in found for line in one["wrong"][check]] for check in CHECKS}
    if has_promtool():
        wrong["promtool"] += [f"rules: {line}" for line in promtool_of_rules()]
    gaps = [one["stages_gap"] for one in found if one["stages_gap"] is not None]
    return {
        "bytes_equal": not wrong["bytes"],
        "failures_equal": not wrong["failures"],
        "gauges_equal": not wrong["gauges"],
        "stages_gap": max(gaps, default=None),
        "promtool": not wrong["promtool"] if has_promtool() else None,
        "promtool_missing": ""
        if has_promtool()
        else "promtool is not here (Debian's package prometheus has it)",
        "overhead": None,
        "engines": [row for one in found for row in one["rows"]],
        "not_moved": {engine: one["not_moved"] for engine, one in zip(engines, found, strict=True)},
        "wrong": [line for lines in wrong.values() for line in lines],
        "wrong_by_check": wrong,
    }


def overhead() -> dict[str, Any]:
    """What ``sage-kvt bench telemetry`` printed."""
    say("what telemetry costs")
    done = subprocess.run(
        [console_script("sage-kvt"), *OVERHEAD], stdout=subprocess.PIPE, text=True, check=False, timeout=600
    )
    if not done.stdout.strip():
        raise ServerError(f"sage-kvt {' '.join(OVERHEAD)} ended with status {done.returncode}")
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def shown(result: dict[str, Any]) -> str:
    lines = [f"wrong: {sentence}" for sentence in result["wrong"]]
    lines += [f"{name}: {result[name]}" for name in ("bytes_equal", "failures_equal", "gauges_equal")]
    gap = result["stages_gap"]
    lines.append(
        f"stages differ from the whole by at most {gap:.3%}" if gap is not None else "no stages were told"
    )
    lines.append(f"promtool finds nothing wrong: {result['promtool_missing'] or result['promtool']}")
    if result["overhead"]:
        lines.append(f"telemetry costs at most {result['overhead']['worst']:+.2%}")
    for engine, reasons in result["not_moved"].items():
        lines += [f"{engine}, not moved: {name} ({why})" for name, why in reasons.items()]
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    unwind_on_sigterm()
    sys.exit(main())
