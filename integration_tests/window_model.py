# SPDX-License-Identifier: Apache-2.0
"""A small model for SGLang's hybrid pool: a Cohere2 with random weights, whose every second layer sees a window.

Most architectures that get this pool by their name want kernels that a CPU lacks (attention sinks, experts), and
SGLang switches it off for Gemma 2 and 3. Any other may ask for it in its configuration, as this one does.

Run as a program it writes the model into a folder: ``python -m integration_tests.window_model FOLDER``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from baselines.sides import PLUGINS
from integration_tests.recall import VOCABULARY
from sage_kv_connector.launch.sglang import ON_CPU

LAYERS, KV_HEADS, HEAD_DIM, WINDOW = 4, 2, 32, 256
#: By layer: whether it sees a window.
WINDOWED = [True, False] * (LAYERS // 2)

#: Of servers: SGLang's attention on a CPU reads windows where they are, and Cohere's norm is not compiled first.
SERVERS_ENV = {
    "SAGE_KVT_WINDOWS_ON_CPU": "1",
    "PYTHONPATH": os.pathsep.join([str(ON_CPU), str(PLUGINS)]),
    "TORCHDYNAMO_DISABLE": "1",
}


def build(path: Path) -> None:
    """Write it unless it is there."""
    import torch
    from transformers import Cohere2Config, Cohere2ForCausalLM

    from sage_kv_connector.launch.tiny_model import save_tokenizer

    torch.manual_seed(0)
    config = Cohere2Config(
        vocab_size=VOCABULARY, hidden_size=4 * HEAD_DIM, intermediate_size=256, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=KV_HEADS, max_position_embeddings=8192, sliding_window=WINDOW,
        layer_types=["sliding_attention" if window else "full_attention" for window in WINDOWED],
        logit_scale=1.0, bos_token_id=256, eos_token_id=257, pad_token_id=0, dtype="bfloat16",
    )  # fmt: skip
    model = Cohere2ForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0.0, 0.4 if "self_attn" in name else 0.12)
    save_tokenizer(path)
    model.save_pretrained(path)
    written = json.loads((path / "config.json").read_text())
    written |= {"is_hybrid_swa": True, "hybrid_layer_pattern": [int(window) for window in WINDOWED]}
    (path / "config.json").write_text(json.dumps(written, indent=2))


if __name__ == "__main__":
    build(Path(sys.argv[1]))
