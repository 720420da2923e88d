# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt demo``: two real vLLM servers, vLLM's router, and our connector between them.

First the hand-over is timed with fresh prompts, step by step as a router drives it.
Then audits are on: both servers digest the pages of each transfer where they lie, and
token ids from the router are compared with those of one server alone.
"""

from __future__ import annotations

import json
import random
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from sage_kv_connector.config import SECRET_ENV
from sage_kv_connector.console import bytes_text, progress
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.launch.process import Process, core_halves, running
from sage_kv_connector.launch.tiny_model import build
from sage_kv_connector.launch.vllm import PREFILL_PARAMS, VllmOptions, complete, router, vllm_server

REPEATS = 3
ANSWER_TOKENS = 16


class Pair(NamedTuple):
    """A prefill and a decode server with a router before them."""

    prefill: Process
    decode: Process
    router: Process
    audit: Path


def run_demo(prompt_tokens: int, dispatch: str, backend: str) -> dict[str, Any]:
    """Start everything, hand over, compare, stop everything. Raises ServerError with the tail of a log."""
    from vllm import __version__ as vllm_version

    prompts = fresh_prompts(prompt_tokens)
    with (
        tempfile.TemporaryDirectory(prefix="sage-kvt-demo-") as name,
        _pair(Path(name), prompt_tokens, dispatch, backend) as pair,
    ):
        progress.print(f"handing over {REPEATS} fresh prompts of {prompt_tokens} tokens")
        complete(pair.router.url, next(prompts), max_tokens=2)  # opens the session
        timed = [_hand_over(pair, next(prompts)) for _ in range(REPEATS)]
        recomputed = [complete(pair.decode.url, next(prompts), max_tokens=2).ttft_s for _ in range(REPEATS)]
        progress.print("comparing token ids and KV bytes")
        pair.audit.touch()
        prompt = next(prompts)
        routed = complete(pair.router.url, prompt, max_tokens=ANSWER_TOKENS)
        alone = complete(pair.prefill.url, prompt, max_tokens=ANSWER_TOKENS)
        records = [json.loads(line) for line in pair.audit.read_text().splitlines()]
    sent = [r for r in records if r["side"] == "producer"]
    received = [r for r in records if r["side"] == "consumer"]
    transfer_s = received[-1]["transfer_s"] if received else None
    return {
        "prompt_tokens": prompt_tokens,
        "kv_bytes": received[-1]["nbytes"] if received else 0,
        "transfer_s": transfer_s,
        "gbytes_per_s": received[-1]["nbytes"] / transfer_s / 1e9 if transfer_s else None,
        "prefill_s": median(prefill for prefill, _ in timed),
        "decode_ttft_s": median(ttft for _, ttft in timed),
        "recompute_ttft_s": median(recomputed),
        "routed_ttft_s": routed.ttft_s,
        "token_ids_equal": len(routed.token_ids) == ANSWER_TOKENS and routed.token_ids == alone.token_ids,
        "kv_bytes_equal": bool(received) and [r["sha256"] for r in sent] == [r["sha256"] for r in received],
        "dispatch": dispatch,
        "backend": received[-1]["backend"] if received else None,
        "mode": received[-1]["mode"] if received else None,
        "engine_version": f"vllm {vllm_version}",
    }


def demo_rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The result as a table for people."""

    def milliseconds(key: str) -> str:
        return "-" if result[key] is None else f"{result[key] * 1e3:.1f} ms"

    moved = f"{bytes_text(result['kv_bytes'])} in {milliseconds('transfer_s')}"
    rate = result["gbytes_per_s"]
    yield "prompt", f"{result['prompt_tokens']} tokens"
    yield "KV handed over", moved + (f", {rate:.2f} GB/s" if rate else "")
    yield "over", f"{result['backend']} ({result['mode']}), {result['dispatch']} dispatch"
    yield "prefill", milliseconds("prefill_s")
    yield "decode TTFT, handed over", milliseconds("decode_ttft_s")
    yield "decode TTFT, recomputed", milliseconds("recompute_ttft_s")
    yield "token ids equal to one server's", str(result["token_ids_equal"])
    yield "KV bytes equal on both sides", str(result["kv_bytes_equal"])
    yield "engine", result["engine_version"]


@contextmanager
def _pair(directory: Path, prompt_tokens: int, dispatch: str, backend: str) -> Iterator[Pair]:
    model = build(directory, "small")
    audit = directory / "audit.jsonl"
    secret = {SECRET_ENV: secrets.token_urlsafe(24)}
    options = VllmOptions(model, directory, max_model_len=prompt_tokens + 256, env=secret)
    bootstrap = free_port() if dispatch == "concurrent" else None
    words = f"sage_kvt:backend={backend},audit_file={audit},host=127.0.0.1"
    halves = core_halves()
    prefill_words = words if bootstrap is None else f"{words},bootstrap_port={bootstrap}"
    prefill = vllm_server("prefill", options, prefill_words, halves[0])
    decode = vllm_server("decode", options, words, halves[1])
    mode = "nixl" if bootstrap is None else "mooncake"
    front = router(prefill, decode, directory, mode=mode, bootstrap_port=bootstrap)
    progress.print("starting two vLLM servers (about a minute)")
    with running(prefill, decode), running(front):
        yield Pair(prefill, decode, front, audit)


def _hand_over(pair: Pair, prompt: list[int]) -> tuple[float, float]:
    """Seconds of prefill, and of decode's first token after prefill answered."""
    first = complete(pair.prefill.url, prompt, max_tokens=1, kv_transfer_params=PREFILL_PARAMS, stream=False)
    answer = complete(pair.decode.url, prompt, max_tokens=2, kv_transfer_params=first.kv_transfer_params)
    return first.total_s, answer.ttft_s


def fresh_prompts(tokens: int) -> Iterator[list[int]]:
    """Prompts that share no prefix, so that no cache has seen them; bytes 1 to 255 are the vocabulary."""
    source = random.Random()
    while True:
        yield [source.randint(1, 255) for _ in range(tokens)]
