# SPDX-License-Identifier: Apache-2.0
"""A model with recurrent states (short convolutions) beside attention; decode computes its last token once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from integration_tests import request_kinds as kinds
from integration_tests.cluster import bare_word, gauges
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.launch.process import core_halves, running
from sage_kv_connector.launch.tiny_model import VOCABULARY, save_tokenizer
from sage_kv_connector.launch.vllm import VllmOptions, vllm_server


@pytest.fixture(scope="module")
def pair(scratch: Path, secret: dict[str, str]) -> Iterator[kinds.Pair]:
    import torch
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(1)
    config = Lfm2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        layer_types=["conv", "full_attention"] * 2,
        conv_dim=128,
        block_dim=128,
        block_ffn_dim_multiplier=1.0,
        block_auto_adjust_ff_dim=False,
        block_multiple_of=64,
        block_ff_dim=256,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=0,
    )
    path = scratch / "recurrent"
    save_tokenizer(path)
    model = Lfm2ForCausalLM(config)
    with torch.no_grad():  # answers that depend on the whole context
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0.0, 0.5 if "self_attn" in name else 0.12)
    model.save_pretrained(path)
    port = free_port()
    words = bare_word()
    options = VllmOptions(path, scratch, 4096, extra=("--dtype", "float32"), env=secret)
    first, second = core_halves()
    prefill = vllm_server("prefill-recurrent", options, f"{words},bootstrap_port={port}", first)
    decode = vllm_server("decode-recurrent", options, words, second)
    with running(prefill, decode):
        yield kinds.Pair(prefill, decode, prefill, f"http://127.0.0.1:{port}")


@pytest.mark.parametrize("dispatch", ["sequential", "concurrent"])
def test_log_probabilities_are_those_of_one_server(pair: kinds.Pair, dispatch: kinds.Dispatch) -> None:
    """vLLM 0.32 on CPU computes short convolutions otherwise in steps of one token than in longer ones.

    Decode takes such a step for the last token. So the single server is made to do the same: it has all but
    the last token in its prefix cache, which keeps states at the ends of blocks.
    """
    failed = gauges(pair.decode).get("failed_loads", 0)
    for tokens in (129, 257, 1025):
        sent = kinds.completion(kinds.prompt_of(tokens), logprobs=1)
        kinds.ask(pair.alone, sent.path, {**sent.body, "prompt": sent.prompts[0][:-1]})
        answers = [
            kinds.ask(pair.alone, sent.path, sent.body)["choices"][0],
            pair.hand_over(sent, dispatch)["choices"][0],
        ]
        right, handed = ((one["token_ids"], one["logprobs"]["token_logprobs"]) for one in answers)
        assert handed[0] == right[0], f"{tokens} tokens"
        assert handed[1] == pytest.approx(right[1], abs=1e-4), f"{tokens} tokens"
    assert kinds.held(pair) == {}
    assert gauges(pair.decode).get("failed_loads", 0) == failed, "all of them were handed over"


def test_a_state_is_had_for_its_own_number_of_tokens_only(pair: kinds.Pair) -> None:
    failed = gauges(pair.decode).get("failed_loads", 0)
    prompt = kinds.prompt_of(500)
    sent = kinds.completion(prompt[:300])
    answer = kinds.choices(pair.hand_over(sent, "sequential", on_prefill={"prompt": prompt}))
    assert answer == kinds.choices(kinds.ask(pair.alone, sent.path, sent.body))
    kinds.held(pair)
    assert gauges(pair.decode).get("failed_loads", 0) == failed + 1
