# SPDX-License-Identifier: Apache-2.0
"""Small models and inputs for kinds of requests that plain text models do not know: adapters, embeddings, images."""

from __future__ import annotations

import base64
import io
import json
import random
from pathlib import Path

from integration_tests.request_pair import TOKENS, Sent
from sage_kv_connector.launch.tiny_model import SHAPES, VOCABULARY, save_tokenizer

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


def new_image() -> str:
    """A data URL; all are of one size."""
    from PIL import Image

    pixels = bytes(random.randrange(256) for _ in range(3 * IMAGE_SIDE * IMAGE_SIDE))
    written = io.BytesIO()
    Image.frombytes("RGB", (IMAGE_SIDE, IMAGE_SIDE), pixels).save(written, "PNG")
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"


def pictured() -> Sent:
    """The same question about a new image."""
    image = {"type": "image_url", "image_url": {"url": new_image()}}
    content = [image, {"type": "text", "text": "what is it " * 30}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": TOKENS}
    return Sent("/v1/chat/completions", body, [])


def build_vision_model(directory: Path) -> Path:
    """An Idefics3 with random weights: 4 tokens an image."""
    import torch
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
        LlamaConfig,
        PreTrainedTokenizerFast,
    )
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig

    path = directory / "vision"
    if (path / "model.safetensors").exists():
        return path
    save_tokenizer(path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    special = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special, "pad_token": "<eos>"})
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=VOCABULARY + len(special), hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, bos_token_id=256,
        eos_token_id=257, pad_token_id=257,
    )  # fmt: skip
    vision = Idefics3VisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=IMAGE_SIDE,
        patch_size=14,
    )  # fmt: skip
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = Idefics3Config(
        vision_config=vision, text_config=text, image_token_id=image, scale_factor=2, pad_token_id=257,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = Idefics3ForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0.0, 0.4 if "self_attn" in name else 0.12)
    model.save_pretrained(path)
    side = {"longest_edge": IMAGE_SIDE}
    images = Idefics3ImageProcessorPil(size=side, max_image_size=side, do_image_splitting=False)
    Idefics3Processor(images, tokenizer, image_seq_len=4).save_pretrained(path)
    return path


def build_pixtral(directory: Path) -> Path:
    """A LLaVA with Pixtral's eyes and random weights, which SGLang serves on a CPU; ``[IMG]`` stands for an image."""
    import torch
    from transformers import (
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        PixtralImageProcessorPil,
        PixtralProcessor,
        PixtralVisionConfig,
        PreTrainedTokenizerFast,
    )

    path = directory / "pixtral"
    save_tokenizer(path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    special = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    tokenizer.add_special_tokens({"additional_special_tokens": special, "pad_token": "<pad>"})
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, bos_token_id=256,
        eos_token_id=257, pad_token_id=257,
    )  # fmt: skip
    vision = PixtralVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        image_size=IMAGE_SIDE, patch_size=14,
    )  # fmt: skip
    image = tokenizer.convert_tokens_to_ids("[IMG]")
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=image, vision_feature_layer=-1,
        vision_feature_select_strategy="full", tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0.0, 0.4 if "attention" in name or "attn" in name else 0.12)
    model.save_pretrained(path)
    written = json.loads((path / "config.json").read_text())
    written |= {"image_token_index": image, "torch_dtype": "float32"}  # as SGLang reads them
    written["vision_config"]["rope_theta"] = 10000.0
    (path / "config.json").write_text(json.dumps(written))
    images = PixtralImageProcessorPil(
        size={"longest_edge": IMAGE_SIDE}, patch_size={"height": 14, "width": 14}
    )
    PixtralProcessor(images, tokenizer, patch_size=14).save_pretrained(path)
    return path


def build_draft(directory: Path) -> Path:
    """An EAGLE head with random weights for the small model: one layer, whose KV is of the model's shape."""
    import torch
    from safetensors.torch import save_file

    path = directory / "eagle"
    path.mkdir(exist_ok=True)
    width, kv_width = SHAPE.heads * SHAPE.head_dim, SHAPE.kv_heads * SHAPE.head_dim
    hidden, inner = SHAPE.hidden, 2 * SHAPE.hidden
    generator = torch.Generator().manual_seed(5)
    shapes = {
        "fc.weight": (hidden, 2 * hidden),
        "layers.0.self_attn.q_proj.weight": (width, hidden),
        "layers.0.self_attn.k_proj.weight": (kv_width, hidden),
        "layers.0.self_attn.v_proj.weight": (kv_width, hidden),
        "layers.0.self_attn.o_proj.weight": (hidden, width),
        "layers.0.mlp.gate_proj.weight": (inner, hidden),
        "layers.0.mlp.up_proj.weight": (inner, hidden),
        "layers.0.mlp.down_proj.weight": (hidden, inner),
    }
    tensors = {name: torch.randn(shape, generator=generator) * 0.12 for name, shape in shapes.items()}
    tensors["layers.0.post_attention_layernorm.weight"] = torch.ones(hidden)
    save_file(tensors, path / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": 1, "num_attention_heads": SHAPE.heads,
        "num_key_value_heads": SHAPE.kv_heads, "head_dim": SHAPE.head_dim, "max_position_embeddings": 40960,
        "bos_token_id": 256, "eos_token_id": 257, "torch_dtype": "float32", "rms_norm_eps": 1e-6,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path


def build_multi_token_model(directory: Path) -> Path:
    """A MiMo with random weights: a Qwen2 and, in the same files, one layer that drafts the next token (MTP)."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM

    path = directory / "mimo"
    if (path / "model.safetensors").exists():
        return path
    save_tokenizer(path)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=SHAPE.hidden, intermediate_size=2 * SHAPE.hidden,
        num_hidden_layers=SHAPE.layers, num_attention_heads=SHAPE.heads, num_key_value_heads=SHAPE.kv_heads,
        max_position_embeddings=40960, tie_word_embeddings=False, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0.0, 0.5 if "self_attn" in name else 0.12)
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    draft = "model.mtp_layers.0."
    block = {name: weight for name, weight in tensors.items() if name.startswith("model.layers.0.")}
    tensors |= {name.replace("model.layers.0.", draft): weight.clone() for name, weight in block.items()}
    tensors[f"{draft}input_proj.weight"] = torch.randn(SHAPE.hidden, 2 * SHAPE.hidden) * 0.12
    for norm in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
        tensors[f"{draft}{norm}.weight"] = torch.ones(SHAPE.hidden)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    written = json.loads((path / "config.json").read_text())
    written |= {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    (path / "config.json").write_text(json.dumps(written))
    return path


def build_hybrid_model(directory: Path) -> Path:
    """Two kv groups: every second layer sees a window of 256 tokens only."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(1)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        sliding_window=256,
        layer_types=["sliding_attention", "full_attention"] * 2,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=0,
    )
    path = directory / "hybrid"
    save_tokenizer(path)
    Gemma3ForCausalLM(config).save_pretrained(path)
    return path
