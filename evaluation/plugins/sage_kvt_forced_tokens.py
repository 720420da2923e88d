# SPDX-License-Identifier: Apache-2.0
"""A logits processor of vLLM for servers that are evaluated: decode generates the tokens that it is told.

A request says which, ``vllm_xargs: {"forced_tokens": [...]}``. Log-probabilities in the answer are those before any
processor (vLLM's ``--logprobs-mode raw_logprobs``, its default): what the model gives to each of these tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates


class ForcedTokens(LogitsProcessor):  # type: ignore[misc]
    """Each row of a batch with the tokens it must have, and those that it has so far."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, tuple[list[int], list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, _forced)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """``logits``: rows × vocabulary; changed in place."""
        for row, (forced, generated) in self._rows.items():
            if len(generated) < len(forced):
                logits[row] = float("-inf")
                logits[row, forced[len(generated)]] = 0.0
        return logits


def _forced(
    params: SamplingParams, _prompt: list[int] | None, generated: list[int]
) -> tuple[list[int], list[int]] | None:
    told = (params.extra_args or {}).get("forced_tokens")
    return ([int(token) for token in told], generated) if told else None
