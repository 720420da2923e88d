# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt demo --engine sglang``: two real SGLang servers, sglang-router, and our transfer backend.

A third server without roles says what one server alone answers and how long that takes.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sage_kv_connector.config import SECRET_ENV
from sage_kv_connector.console import progress
from sage_kv_connector.demo.result import ANSWER_TOKENS, REPEATS, demo_result, fresh_prompts
from sage_kv_connector.launch.process import Process, ServerError, core_halves, running
from sage_kv_connector.launch.sglang import (
    DECODE,
    PREFILL,
    SglangOptions,
    SglangProcess,
    build_model,
    generate,
    room_at,
    sglang_router,
    sglang_server,
)

PAGE_SIZE = 16


def run_sglang_demo(prompt_tokens: int, backend: str) -> dict[str, Any]:
    """Start everything, hand over, compare, stop everything. Raises ServerError with the tail of a log."""
    if find_spec("sglang") is None:
        raise ServerError(
            "sglang is not installed here; `make demo` installs it in an environment of its own"
        )
    prompts = fresh_prompts(prompt_tokens)
    with tempfile.TemporaryDirectory(prefix="sage-kvt-demo-") as name:
        directory = Path(name)
        audit = directory / "audit.jsonl"
        options = SglangOptions(
            build_model(directory, "small"),
            directory,
            prompt_tokens + 256,
            max_total_tokens=8 * (prompt_tokens + 256),
            # fp32, so that neither chunking nor batching changes a greedy token.
            extra=("--dtype", "float32", "--page-size", str(PAGE_SIZE), "--disable-radix-cache"),
            env={SECRET_ENV: secrets.token_urlsafe(24)},
        )
        transport: dict[str, object] = {"backend": backend, "audit_file": audit}
        first, second = core_halves()
        prefill = sglang_server("prefill", options, PREFILL, first, transport=transport)
        decode = sglang_server("decode", options, DECODE, second, transport=transport)
        alone = sglang_server("alone", options, None, first)
        router = sglang_router(prefill, decode, directory)
        progress.print("starting three SGLang servers (about a minute and a half)")
        with running(prefill, decode, alone), running(router):
            progress.print(f"handing over {REPEATS} fresh prompts of {prompt_tokens} tokens")
            generate(router.url, next(prompts), max_tokens=2)  # opens the session
            generate(alone.url, next(prompts), max_tokens=2)
            timed = [_on_pair(prefill, decode, next(prompts)) for _ in range(REPEATS)]
            recomputed = [generate(alone.url, next(prompts), max_tokens=2).ttft_s for _ in range(REPEATS)]
            progress.print("comparing token ids and KV bytes")
            audit.touch()
            prompt = next(prompts)
            routed = generate(router.url, prompt, max_tokens=ANSWER_TOKENS)
            single = generate(alone.url, prompt, max_tokens=ANSWER_TOKENS)
            time.sleep(0.2)  # prefill's record may come after decode's answer
            return demo_result(
                prompt_tokens=prompt_tokens,
                dispatch="concurrent",
                engine_version=f"sglang {version('sglang')}",
                audit=audit,
                timed=timed,
                recomputed=recomputed,
                routed=routed,
                alone=single.token_ids,
            )


def _on_pair(prefill: SglangProcess, decode: Process, prompt: list[int]) -> tuple[float, float]:
    """Both asked at once: seconds until prefill answered, and until decode's first token."""
    bootstrap = room_at(prefill.bootstrap_port)
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(generate, prefill.url, prompt, max_tokens=2, bootstrap=bootstrap, stream=False)
        answer = generate(decode.url, prompt, max_tokens=2, bootstrap=bootstrap)
        return beside.result().ttft_s, answer.ttft_s
