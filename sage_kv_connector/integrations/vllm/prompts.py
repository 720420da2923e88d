# SPDX-License-Identifier: Apache-2.0
"""vLLM's requests as prompts: what their KV depends on beside the model, and how much of them prefill computes."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from sage_kv_connector.contract.prompt import Prompt, PromptItem
from sage_kv_connector.integrations.common.weight_files import weights_digest

logger = logging.getLogger(__name__)


def prompt_of(request: Any) -> Prompt:
    """Everything that vLLM's own prefix cache tells apart, said so that another server says the same."""
    tokens = int(request.num_prompt_tokens)
    ids = request.prompt_token_ids
    embeddings = getattr(request, "prompt_embeds", None)
    are_tokens = getattr(request, "prompt_is_token_ids", None)
    return Prompt(
        [0] * tokens if ids is None else ids,
        salt=getattr(request, "cache_salt", None) or "",
        adapter=adapter_identity(getattr(request, "lora_request", None)),
        items=[_item(feature) for feature in getattr(request, "mm_features", None) or ()],
        embeddings=b"" if embeddings is None else _embeddings(embeddings, are_tokens),
    )


def adapter_identity(lora: Any) -> str:
    """What an adapter's weights are, wherever they lie; its name and path where the files can't be read from here."""
    if lora is None:
        return ""
    named = f"{lora.lora_name} at {lora.lora_path}"
    try:
        return weights_digest(Path(lora.lora_path)) or named
    except (OSError, ValueError) as error:
        logger.warning("adapter %s is known by its name only: %s", named, error)
        return named


def _item(feature: Any) -> PromptItem:
    """``mm_hash`` is the content's; ``identifier`` may begin with an adapter's name on this server."""
    place = feature.mm_position
    identity = getattr(feature, "mm_hash", None) or feature.identifier
    return PromptItem(int(place.offset), int(place.length), f"{feature.modality}:{identity}")


def _embeddings(rows: Any, are_tokens: list[bool] | None) -> bytes:
    """16 bytes a position: the hash of its row, zeros where the prompt has a token instead."""
    import torch

    raw = rows.detach().cpu().contiguous().view(torch.uint8).numpy()
    return b"".join(
        bytes(16) if are_tokens is not None and are_tokens[i] else hashlib.sha256(row.tobytes()).digest()[:16]
        for i, row in enumerate(raw)
    )


def leave_out(request: Any, last: int) -> None:
    """Let prefill stop before the ``last`` tokens that decode computes again, where that must not be done twice.

    Decode computes a prompt's last token itself. A recurrent state must not have seen it then, and a window
    must still reach as far back as that token looks.
    """
    if not last or request.num_prompt_tokens <= last:
        return
    if request.prompt_token_ids is not None:
        del request.prompt_token_ids[-last:]
    if getattr(request, "prompt_embeds", None) is not None:
        request.prompt_embeds = request.prompt_embeds[:-last]
    del request._all_token_ids[-last:]
    request.num_prompt_tokens -= last
    request.max_tokens = 1
    request.block_hashes.clear()
    request.update_block_hashes()
