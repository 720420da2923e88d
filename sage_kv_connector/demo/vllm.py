# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt demo``: two real vLLM servers, vLLM's router, and our connector between them.

First the hand-over is timed with fresh prompts, step by step as a router drives it.
Then audits are on: both servers digest the pages of each transfer where they lie, and
token ids from the router are compared with those of one server alone. The model has random
weights, and bf16 for its logits: of one prompt in ten some token leads the next by nothing, and how many tokens a
step computes decides. Such a prompt says nothing about KV, so another one is taken.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from sage_kv_connector.config import SECRET_ENV
from sage_kv_connector.console import progress
from sage_kv_connector.demo.result import ANSWER_TOKENS, REPEATS, demo_result, fresh_prompts
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.launch.process import Process, core_halves, running
from sage_kv_connector.launch.tiny_model import build
from sage_kv_connector.launch.vllm import PREFILL_PARAMS, VllmOptions, complete, judged, router, vllm_server

#: Twice what neighbouring bf16 between 2 and 4 differ by, where the logits are.
ROUNDING = 2 * 2**-6
#: Most have a token that leads by less.
MOST_PROMPTS = 30


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
        for prompt in islice(prompts, MOST_PROMPTS):
            routed = complete(pair.router.url, prompt, max_tokens=ANSWER_TOKENS)
            alone = judged(pair.prefill.url, prompt, ANSWER_TOKENS)
            if alone.margin > ROUNDING:
                break
        return demo_result(
            prompt_tokens=prompt_tokens,
            dispatch=dispatch,
            engine_version=f"vllm {vllm_version}",
            audit=pair.audit,
            timed=timed,
            recomputed=recomputed,
            routed=routed,
            alone=alone.token_ids,
        )


@contextmanager
def _pair(directory: Path, prompt_tokens: int, dispatch: str, backend: str) -> Iterator[Pair]:
    model = build(directory, "small")
    audit = directory / "audit.jsonl"
    secret = {SECRET_ENV: secrets.token_urlsafe(24)}
    options = VllmOptions(model, directory, max_model_len=prompt_tokens + 256, env=secret)
    bootstrap = free_port()
    words = f"sage_kvt:backend={backend},audit_file={audit},host=127.0.0.1"
    halves = core_halves()
    prefill = vllm_server("prefill", options, f"{words},bootstrap_port={bootstrap}", halves[0])
    decode = vllm_server("decode", options, words, halves[1])
    front = router(prefill, decode, directory, dispatch=dispatch, bootstrap_port=bootstrap)
    progress.print("starting two vLLM servers (about a minute)")
    with running(prefill, decode), running(front):
        yield Pair(prefill, decode, front, audit)


def _hand_over(pair: Pair, prompt: list[int]) -> tuple[float, float]:
    """Seconds of prefill, and of decode's first token after prefill answered."""
    first = complete(pair.prefill.url, prompt, max_tokens=1, kv_transfer_params=PREFILL_PARAMS, stream=False)
    answer = complete(pair.decode.url, prompt, max_tokens=2, kv_transfer_params=first.kv_transfer_params)
    return first.total_s, answer.ttft_s
