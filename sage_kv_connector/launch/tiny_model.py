# SPDX-License-Identifier: Apache-2.0
"""A small model that needs no download: a Qwen3 with random weights and a byte-level tokenizer.

Its text means nothing. Attention is scaled up so that greedy tokens depend on the
prompt; still, demo and tests compare token ids and KV bytes, never text alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple


class ModelShape(NamedTuple):
    """``kv_bytes_per_token`` in bf16 is 4 * layers * kv_heads * head_dim."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int

    @property
    def kv_bytes_per_token(self) -> int:
        return 4 * self.layers * self.kv_heads * self.head_dim


#: ``small``: quick to serve. ``bench``: 16 KiB of KV a token, the peers' figures were taken with that. ``wide``: as
#: much KV, and a fifth of the arithmetic.
SHAPES = {
    "small": ModelShape(layers=4, heads=4, kv_heads=2, head_dim=64, hidden=128),
    "bench": ModelShape(layers=8, heads=8, kv_heads=8, head_dim=64, hidden=128),
    "wide": ModelShape(layers=4, heads=8, kv_heads=8, head_dim=128, hidden=32),
}
VOCABULARY = 256 + 2
MAX_POSITIONS = (128 + 8) * 1024


def build(directory: Path, shape_name: str, *, seed: int = 0) -> Path:
    """Write the model into ``directory``/shape_name unless it is there; returns its path.

    Raises ImportError when torch or transformers are missing (they come with vLLM).
    """
    path = directory / f"{shape_name}-{seed}"
    if (path / "model.safetensors").exists():
        return path
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = SHAPES[shape_name]
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=2 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=256,
        eos_token_id=257,
        dtype="bfloat16",
    )
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                weight.fill_(1.6)
            elif weight.dim() == 2:
                weight.normal_(0.0, 0.5 if "self_attn" in name else 0.12)
    save_tokenizer(path)
    model.save_pretrained(path)
    return path


def save_tokenizer(path: Path) -> None:
    """One token a byte, 256 begins and 257 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)} | {"<bos>": 256, "<eos>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
    fast.save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 257}))
