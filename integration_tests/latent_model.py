# SPDX-License-Identifier: Apache-2.0
"""A small model with latent attention (MLA): a DeepSeek-V2 with random weights and dense layers.

Run as a program it writes the model into a folder: ``python -m integration_tests.latent_model FOLDER``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

LAYERS, LATENT, ROPE = 3, 64, 32


def build(path: Path) -> None:
    """Write it unless it is there."""
    import torch
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    from sage_kv_connector.launch.tiny_model import VOCABULARY, save_tokenizer

    torch.manual_seed(0)
    config = DeepseekV2Config(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, moe_intermediate_size=64,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1,
        n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1, first_k_dense_replace=LAYERS,
        moe_layer_freq=1, kv_lora_rank=LATENT, q_lora_rank=None, qk_rope_head_dim=ROPE, qk_nope_head_dim=32,
        v_head_dim=32, max_position_embeddings=8192, tie_word_embeddings=False, bos_token_id=256,
        eos_token_id=257, dtype="bfloat16",
    )  # fmt: skip
    model = DeepseekV2ForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0.0, 0.3 if "self_attn" in name else 0.12)
    save_tokenizer(path)
    model.save_pretrained(path)
    # SGLang on a CPU wants DeepSeek's own scaling of positions; up to 4,096 tokens it changes little.
    written = json.loads((path / "config.json").read_text())
    written.pop("rope_parameters", None)
    written |= {
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn", "rope_type": "deepseek_yarn", "factor": 2, "original_max_position_embeddings": 4096,
            "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
        },
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(written, indent=2))


if __name__ == "__main__":
    build(Path(sys.argv[1]))
