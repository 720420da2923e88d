# SPDX-License-Identifier: Apache-2.0
"""Pinned memory done without: PyTorch can't pin where it finds no accelerator, and there nothing needs it.

SGLang 0.5.23 asks first whether memory can be pinned, but not in its LoRA adapters (``sglang/srt/lora``). They see
a PyTorch that leaves ``pin_memory=True`` out; all else in the process keeps its own, whose functions can be scripted.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

#: Functions of PyTorch that LoRA adapters give ``pin_memory=True``.
PINNING = ("tensor", "empty", "zeros")


class UnpinnedTorch(types.ModuleType):
    """``torch``, but for those functions."""

    def __init__(self, torch: Any) -> None:
        super().__init__(torch.__name__)
        self._torch = torch
        for name in PINNING:
            setattr(self, name, unpinned(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)


def unpinned(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def without(*args: Any, **words: Any) -> Any:
        words.pop("pin_memory", None)
        return function(*args, **words)

    return without


def as_it_is(tensor: Any, *_: object) -> Any:
    return tensor


def unpin(module: Any) -> None:
    module.torch.Tensor.pin_memory = as_it_is
    module.torch = UnpinnedTorch(module.torch)


#: What is done to each module once it is loaded.
DEEDS = dict.fromkeys(("sglang.srt.lora.layers", "sglang.srt.lora.backend.torch_backend"), unpin)
