# SPDX-License-Identifier: Apache-2.0
"""A model with two kv groups (sliding window and full attention), under vLLM's hybrid KV manager."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from integration_tests.cluster import PREFILL_PARAMS, bare_word, new_prompt
from integration_tests.request_models import build_hybrid_model
from sage_kv_connector.launch.process import core_halves, running
from sage_kv_connector.launch.vllm import VllmOptions, complete, router, vllm_server


@pytest.fixture(scope="module")
def hybrid_model(scratch: Path) -> Path:
    return build_hybrid_model(scratch)


def test_both_kv_groups_are_handed_over(scratch: Path, hybrid_model: Path, secret: dict[str, str]) -> None:
    audit = scratch / "audit-hybrid.jsonl"
    audit.touch()
    words = bare_word(audit_file=audit)
    options = VllmOptions(hybrid_model, scratch, 4096, extra=("--dtype", "float32"), env=secret)
    first, second = core_halves()
    prefill = vllm_server("prefill-hybrid", options, words, first)
    decode = vllm_server("decode-hybrid", options, words, second)
    front = router(prefill, decode, scratch)
    with running(prefill, decode), running(front):
        # 383 and 1,023: the window of the last token begins with the last token of a page.
        for tokens in (100, 383, 384, 1000, 1023, 3000):
            prompt = new_prompt(tokens)
            alone = complete(prefill.url, prompt, max_tokens=24).token_ids
            assert complete(front.url, prompt, max_tokens=24).token_ids == alone
        records = [json.loads(line) for line in audit.read_text().splitlines()]
        digests = {
            side: [r["sha256"] for r in records if r["side"] == side] for side in ("producer", "consumer")
        }
        assert len(digests["producer"]) == 6
        assert digests["producer"] == digests["consumer"]
        whole = 3072 * 4096
        assert records[-1]["nbytes"] < whole * 2 / 3, "pages before the sliding window are not moved"
        prompt = new_prompt(1000)
        prefill_answer = complete(
            prefill.url, prompt, max_tokens=1, kv_transfer_params=PREFILL_PARAMS, stream=False
        )
        prefill.stop(9)
        answer = complete(
            decode.url, prompt, max_tokens=8, kv_transfer_params=prefill_answer.kv_transfer_params
        )
        assert answer.token_ids == complete(decode.url, prompt, max_tokens=8).token_ids
