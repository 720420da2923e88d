# SPDX-License-Identifier: Apache-2.0
"""Small models and inputs for kinds of requests that plain text models do not know: adapters, embeddings, images."""

from __future__ import annotations

import base64
import io
import json
import random
from pathlib import Path

from integration_tests.request_pair import TOKENS, Sent
from sage_kv_connector.launch.tiny_model import SHAPES

SHAPE = SHAPES["small"]
IMAGE_SIDE = 56


def build_adapter(directory: Path, name: str, seed: int) -> Path:
    """A LoRA adapter of the small model in PEFT's form, strong enough to change every answer."""
    import torch
    from safetensors.torch import save_file

    path, rank = directory / f"adapter-{name}", 8
    path.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    widths = {"q_proj": SHAPE.heads * SHAPE.head_dim, "v_proj": SHAPE.kv_heads * SHAPE.head_dim}
    tensors = {}
    for layer in range(SHAPE.layers):
        for module, width in widths.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, SHAPE.hidden, generator=generator) * 0.2
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(width, rank, generator=generator) * 0.2
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": sorted(widths), "bias": "none",
              "task_type": "CAUSAL_LM", "base_model_name_or_path": "small"}  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def embedded(tokens: int) -> Sent:
    """A prompt that is given as embeddings."""
    import torch

    written = io.BytesIO()
    torch.save(torch.randn(tokens, SHAPE.hidden) * 0.1, written)
    text = base64.b64encode(written.getvalue()).decode()
    return Sent("/v1/completions", {"prompt_embeds": text, "max_tokens": TOKENS}, [])


def pictured() -> Sent:
    """The same question about a new image."""
    from PIL import Image

    pixels = bytes(random.randrange(256) for _ in range(3 * IMAGE_SIDE * IMAGE_SIDE))
    written = io.BytesIO()
    Image.frombytes("RGB", (IMAGE_SIDE, IMAGE_SIDE), pixels).save(written, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is it " * 30}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": TOKENS}
    return Sent("/v1/chat/completions", body, [])
