# SPDX-License-Identifier: Apache-2.0
"""Time to first token through two SGLang servers, ours and Mooncake's backend (tcp) in one run.

    python3 scripts/environment.py --sglang --peers python -m scripts.bench_sglang [--page-size 16] [TOKENS ...]

Both pairs stay up and take turns; the one not measured is stopped (SIGSTOP). Prefill attention is
stubbed on all servers alike (baselines/README.md), so that the hand-over, not the model, is
what is timed. A server alone shows what prefill itself takes: no hand-over can be faster. Prints one
JSON object a prompt length: median and all seconds of each, ours / Mooncake's as median of the ratios
within each round, and the seconds that each adds to the server alone.
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
from pathlib import Path
from statistics import median

from baselines.vllm_peers import PLUGINS
from sage_kv_connector.cli.demo import core_halves, fresh_prompts
from sage_kv_connector.cli.sglang_processes import (
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
from sage_kv_connector.cli.vllm_processes import running
from sage_kv_connector.config import SECRET_ENV

REPEATS = 5
SETTLE_S = 0.5
BACKENDS = {"ours": "sage_kvt", "mooncake": "mooncake"}

#: A prefill and a decode server, or a server alone.
Servers = tuple[SglangProcess, ...]


def main() -> None:
    options = argparse.ArgumentParser(description="See the module's text.")
    options.add_argument("tokens", type=int, nargs="*", default=[2048, 8192])
    options.add_argument("--page-size", type=int, default=64)
    options.add_argument(
        "--shape", default="bench", help="of the model: bench (16 KiB of KV a token) or heavy"
    )
    given = options.parse_args()
    lengths = given.tokens
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
        longest = max(lengths) + 64
        common = (
            "--page-size",
            str(given.page_size),
            "--disable-radix-cache",
            "--chunked-prefill-size",
            "2048",
        )
        servers = SglangOptions(
            build_model(directory, given.shape), directory, longest, 3 * longest, common, env
        )
        pairs: dict[str, Servers] = {}
        for label, backend in BACKENDS.items():
            pairs[label] = (
                sglang_server(f"{label}-prefill", servers, PREFILL, halves[0], backend=backend),
                sglang_server(f"{label}-decode", servers, DECODE, halves[1], backend=backend),
            )
        pairs["alone"] = (sglang_server("alone", servers, None, halves[0]),)
        with running(*pairs["ours"]), running(*pairs["mooncake"]), running(*pairs["alone"]):
            try:
                for tokens in lengths:
                    print(json.dumps(compare(pairs, tokens)), flush=True)
            finally:
                for pair in pairs.values():
                    signal_pair(pair, signal.SIGCONT)


def compare(pairs: dict[str, Servers], tokens: int) -> dict[str, object]:
    """Fresh prompts in turns, the first of each unmeasured."""
    prompts = fresh_prompts(tokens)
    seconds: dict[str, list[float]] = {label: [] for label in pairs}
    for turn in range(REPEATS + 1):
        order = list(pairs)
        random.shuffle(order)
        for label in order:
            for other, pair in pairs.items():
                signal_pair(pair, signal.SIGCONT if other == label else signal.SIGSTOP)
            time.sleep(SETTLE_S)
            servers, prompt = pairs[label], next(prompts)
            if len(servers) == 1:
                answer = generate(servers[0].url, prompt, max_tokens=2)
            else:
                answer = generate_on_pair(servers[0], servers[1], prompt, max_tokens=2)
            if turn:
                seconds[label].append(answer.ttft_s)
    rounds = list(zip(seconds["ours"], seconds["mooncake"], seconds["alone"], strict=True))
    return {
        "prompt_tokens": tokens,
        "ttft_s": {label: median(values) for label, values in seconds.items()},
        "ratio": median(ours / theirs for ours, theirs, _ in rounds),
        "of_alone": median(ours / alone for ours, _, alone in rounds),
        "added_s": {
            "ours": median(ours - alone for ours, _, alone in rounds),
            "mooncake": median(theirs - alone for _, theirs, alone in rounds),
        },
        "all_s": seconds,
    }


def signal_pair(pair: Servers, number: int) -> None:
    for process in pair:
        if process.popen is not None:
            os.killpg(process.popen.pid, number)


if __name__ == "__main__":
    main()
