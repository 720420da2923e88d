# SPDX-License-Identifier: Apache-2.0
"""An input's bytes as choices: real messages whose fields take other values, other types and other shapes.

A decoder in C tells a fuzzer nothing of what it looks at, so changed bytes seldom stay a message. What is changed here
is the tree that a message is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

#: What bounds are about, and what is just beyond them.
NUMBERS = (
    0,
    1,
    -1,
    2,
    63,
    64,
    255,
    4096,
    4097,
    1 << 16,
    1 << 31,
    1 << 32,
    1 << 40,
    (1 << 63) - 1,
    (1 << 64) - 1,
    -(1 << 63),
)
TEXTS = (
    "",
    "x",
    "x" * 256,
    "x" * 257,
    "x" * 4097,
    "shm://a",
    "tcp://[::1]:1",
    "bf16",
    "int4",
    "none",
    "tensor",
    "\0",
    "é\n\x1b[0m",
)
#: Trees that are made here are never deeper than this many levels, and have few leaves; chains are for depth.
DEPTH = 3
MAX_LEAVES = 5000
MAX_CHAIN = 1 << 14


class Choices:
    """Numbers that an input's bytes give, 0 behind its end. ``brackets``: how an array of one begins and ends."""

    def __init__(self, data: bytes, brackets: tuple[bytes, bytes] = (b"\x91", b"")) -> None:
        self._data = data
        self._at = 0
        self._brackets = brackets

    def chain(self) -> msgspec.Raw:
        """Arrays of one in each other, as deep as a message can hold."""
        opens, closes = self._brackets
        depth = self.below(MAX_CHAIN)
        return msgspec.Raw(opens * depth + b"\x30" + closes * depth)

    def below(self, limit: int) -> int:
        size = 1 if limit <= 256 else 3
        piece = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(piece, "little") % limit


def mutated(seeds: Sequence[Any], choices: Choices) -> Any:
    """One of ``seeds`` (trees of builtin values) with a few places changed."""
    tree = seeds[choices.below(len(seeds))]
    for _ in range(choices.below(6)):
        tree = _changed(tree, choices)
    return tree


def _changed(tree: Any, choices: Choices) -> Any:
    children = len(tree) if isinstance(tree, list | tuple | dict) else 0
    if children and choices.below(8) < 6:  # go down
        at = choices.below(children)
        if isinstance(tree, dict):
            key = list(tree)[at]
            return {**tree, key: _changed(tree[key], choices)}
        return [*tree[:at], _changed(tree[at], choices), *tree[at + 1 :]]
    if children and isinstance(tree, dict):
        key = list(tree)[choices.below(children)]
        without = {name: value for name, value in tree.items() if name != key}
        return without if choices.below(2) else {**without, str(_value(choices, DEPTH)): tree[key]}
    if children:
        at = choices.below(children)
        match choices.below(4):
            case 0:
                return [*tree[:at], *tree[at + 1 :]]
            case 1:
                return [*tree[:at], tree[at], *tree[at:]] if _leaves(tree) < MAX_LEAVES else []
            case 2:
                return [*tree, _value(choices, 0)]
            case _:
                return [*tree] * min(choices.below(256), MAX_LEAVES // _leaves(tree))
    return _value(choices, 0)


def _leaves(tree: Any) -> int:
    if isinstance(tree, dict):
        return _leaves(list(tree.values()))
    if isinstance(tree, list | tuple):
        return 1 + sum(map(_leaves, tree))
    return 1 + len(tree) // 64 if isinstance(tree, str | bytes) else 1


def _value(choices: Choices, depth: int) -> Any:
    match choices.below(10 if depth < DEPTH else 6):
        case 0:
            return NUMBERS[choices.below(len(NUMBERS))]
        case 1:
            return choices.below(1 << 24) - (1 << 12)
        case 2:
            return TEXTS[choices.below(len(TEXTS))]
        case 3:
            return bytes(choices.below(256)) if choices.below(16) else bytes(choices.below(1 << 17))
        case 4:
            return (None, True, False, 0.5, -0.0, 1e308, float("inf"), float("nan"))[choices.below(8)]
        case 5:
            return []
        case 6:
            return {str(choices.below(4)): _value(choices, depth + 1)}
        case 7:
            value = _value(choices, depth + 1)
            return [value] * min(choices.below(256), MAX_LEAVES // _leaves(value))
        case 8:
            return choices.chain()
        case _:
            return [_value(choices, depth + 1) for _ in range(choices.below(4))]
