# SPDX-License-Identifier: Apache-2.0
"""Pinned memory done without: PyTorch can't pin where it finds no accelerator, and there nothing needs it.

SGLang 0.5.23 asks first whether memory can be pinned, but not in its LoRA adapters (``sglang/srt/lora``).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

#: Functions of PyTorch that LoRA adapters give ``pin_memory=True``.
PINNING = ("tensor", "empty", "zeros")


def as_it_is(tensor: Any, *_: object) -> Any:
    return tensor


def unpinned(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def without(*args: Any, **words: Any) -> Any:
        words.pop("pin_memory", None)
        return function(*args, **words)

    return without


def unpin(_: types.ModuleType) -> None:
    import torch

    for name in PINNING:
        setattr(torch, name, unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = as_it_is


#: What is done to each module once it is loaded.
DEEDS = {"sglang.srt.lora.layers": unpin}
