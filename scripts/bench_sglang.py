# SPDX-License-Identifier: Apache-2.0
"""Time to first token through two SGLang servers: ours over shm and over tcp, and Mooncake's backend (tcp), in one run.

    python3 scripts/environment.py --sglang --peers python -m scripts.bench_sglang [--page-size 16] [TOKENS ...]

All pairs stay up and take turns; those not measured are stopped (SIGSTOP). Each prompt is asked for twice:

* ``fresh``: prefill computes it while its pages stream. Prefill attention is stubbed on all servers alike
  (baselines/README.md). A server alone shows what prefill itself takes: no hand-over is faster.
* ``cached``: prefill has it in its prefix cache, decode does not, as in a conversation that goes on. What is
  left is the hand-over: all pages go, hardly anything is computed.

Prints one JSON object a prompt length: for each kind the median and all seconds of each contender, and for
ours the medians over the rounds of its ratio to Mooncake's and of what it adds to a server alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from baselines.sides import PLUGINS
from sage_kv_connector.config import SECRET_ENV
from sage_kv_connector.demo.result import fresh_prompts
from sage_kv_connector.launch.process import core_halves, running, unwind_on_sigterm
from sage_kv_connector.launch.sglang import (
    DECODE,
    ON_CPU,
    PREFILL,
    SglangOptions,
    SglangProcess,
    build_model,
    generate,
    generate_on_pair,
    sglang_server,
)

REPEATS = 5
SETTLE_S = 0.5
#: Label → SGLang's backend, and our options.
CONTENDERS: dict[str, tuple[str, dict[str, object]]] = {
    "ours_shm": ("sage_kvt", {"backend": "shm"}),
    "ours_tcp": ("sage_kvt", {"backend": "tcp"}),
    "mooncake": ("mooncake", {}),
}
PEER, ALONE = "mooncake", "alone"
KINDS = ("fresh", "cached")

#: A prefill and a decode server, or a server alone.
Servers = tuple[SglangProcess, ...]


def main() -> None:
    words = argparse.ArgumentParser(description="See the module's text.")
    words.add_argument("tokens", type=int, nargs="*", default=[2048, 8192])
    words.add_argument("--page-size", type=int, default=64)
    given = words.parse_args()
    halves = core_halves()
    with tempfile.TemporaryDirectory(prefix="sage-kvt-bench-") as name:
        directory = Path(name)
        env = {
            SECRET_ENV: secrets.token_urlsafe(16),
            "SAGE_KVT_PREFILL_STUB": "1",
            "SAGE_KVT_MOONCAKE_ON_CPU": "1",
            "MC_FORCE_TCP": "1",
            "PYTHONPATH": os.pathsep.join([str(ON_CPU), str(PLUGINS), os.environ.get("PYTHONPATH", "")]),
        }
        longest = max(given.tokens) + 64
        common = ("--page-size", str(given.page_size), "--chunked-prefill-size", "2048")
        servers = SglangOptions(build_model(directory, "bench"), directory, longest, 3 * longest, common, env)
        pairs: dict[str, Servers] = {}
        for label, (backend, options) in CONTENDERS.items():
            pairs[label] = (
                sglang_server(
                    f"{label}-prefill", servers, PREFILL, halves[0], backend=backend, transport=options
                ),
                sglang_server(
                    f"{label}-decode", servers, DECODE, halves[1], backend=backend, transport=options
                ),
            )
        pairs[ALONE] = (sglang_server(ALONE, servers, None, halves[0]),)
        with running(*(server for pair in pairs.values() for server in pair)):
            try:
                for tokens in given.tokens:
                    print(json.dumps(compare(pairs, tokens)), flush=True)
            finally:
                for pair in pairs.values():
                    signal_pair(pair, signal.SIGCONT)


def compare(pairs: dict[str, Servers], tokens: int) -> dict[str, object]:
    """Fresh prompts in turns, each twice; the first turn is not measured."""
    prompts = fresh_prompts(tokens)
    seconds: dict[str, dict[str, list[float]]] = {kind: {label: [] for label in pairs} for kind in KINDS}
    for turn in range(REPEATS + 1):
        order = list(pairs)
        random.shuffle(order)
        for label in order:
            for other, pair in pairs.items():
                signal_pair(pair, signal.SIGCONT if other == label else signal.SIGSTOP)
            time.sleep(SETTLE_S)
            prompt = next(prompts)
            for kind in KINDS:
                took = ask(pairs[label], prompt)
                if turn:
                    seconds[kind][label].append(took)
    return {"prompt_tokens": tokens} | {kind: summary(found) for kind, found in seconds.items()}


def ask(servers: Servers, prompt: list[int]) -> float:
    if len(servers) == 1:
        return generate(servers[0].url, prompt, max_tokens=2).ttft_s
    return generate_on_pair(servers[0], servers[1], prompt, max_tokens=2).ttft_s


def summary(seconds: dict[str, list[float]]) -> dict[str, object]:
    ours = [label for label in seconds if label not in (PEER, ALONE)]

    def over_rounds(label: str, other: str, what: Callable[[float, float], float]) -> float:
        return median(what(a, b) for a, b in zip(seconds[label], seconds[other], strict=True))

    return {
        "ttft_s": {label: median(values) for label, values in seconds.items()},
        "of_mooncake": {label: over_rounds(label, PEER, lambda a, b: a / b) for label in ours},
        "added_s": {label: over_rounds(label, ALONE, lambda a, b: a - b) for label in [*ours, PEER]},
        "all_s": seconds,
    }


def signal_pair(pair: Servers, number: int) -> None:
    for process in pair:
        if process.popen is not None:
            os.killpg(process.popen.pid, number)


if __name__ == "__main__":
    unwind_on_sigterm()
    main()
