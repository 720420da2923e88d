# SPDX-License-Identifier: Apache-2.0
"""What a demo prints, whichever engine's servers it ran: one hand-over, timed and compared."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from sage_kv_connector.console import bytes_text

REPEATS = 3
ANSWER_TOKENS = 16


class Answered(Protocol):
    """A completion: its tokens, and seconds to the first."""

    @property
    def token_ids(self) -> list[int]: ...

    @property
    def ttft_s(self) -> float: ...


def demo_result(
    *,
    prompt_tokens: int,
    dispatch: str,
    engine_version: str,
    audit: Path,
    timed: Sequence[tuple[float, float]],
    recomputed: Sequence[float],
    routed: Answered,
    alone: list[int],
) -> dict[str, Any]:
    """``timed``: seconds of prefill, and to decode's first token, of each hand-over.

    ``audit``: what both servers digested of one more hand-over, which ``routed`` answers;
    ``alone`` are the token ids of one server to the same prompt.
    """
    records = [json.loads(line) for line in audit.read_text().splitlines()]
    sent = [r for r in records if r["side"] == "producer"]
    received = [r for r in records if r["side"] == "consumer"]
    last = received[-1] if received else {}
    transfer_s = last.get("transfer_s")
    return {
        "prompt_tokens": prompt_tokens,
        "kv_bytes": last.get("nbytes", 0),
        "transfer_s": transfer_s,
        "gbytes_per_s": last["nbytes"] / transfer_s / 1e9 if transfer_s else None,
        "prefill_s": median(prefill for prefill, _ in timed),
        "decode_ttft_s": median(ttft for _, ttft in timed),
        "recompute_ttft_s": median(recomputed),
        "routed_ttft_s": routed.ttft_s,
        "token_ids_equal": len(routed.token_ids) == ANSWER_TOKENS and routed.token_ids == alone,
        "kv_bytes_equal": bool(received) and [r["sha256"] for r in sent] == [r["sha256"] for r in received],
        "dispatch": dispatch,
        "backend": last.get("backend"),
        "mode": last.get("mode"),
        "engine_version": engine_version,
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


def fresh_prompts(tokens: int) -> Iterator[list[int]]:
    """Prompts that share no prefix, so that no cache has seen them; bytes 1 to 255 are the vocabulary."""
    source = random.Random()
    while True:
        yield [source.randint(1, 255) for _ in range(tokens)]
