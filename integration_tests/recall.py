# SPDX-License-Identifier: Apache-2.0
"""Associative recall: prompts whose right continuation stands only in their context.

A prompt is a document of entries, each a key token followed by its eight value tokens,
with filler between them; some questions with their answers; and one open question. The
model in ``integration_tests/recall_model`` (scripts/train_recall_model.py) continues it
with the asked key's values, so wrong KV bytes change what it says.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

MODEL = Path(__file__).parent / "recall_model"

BOS, EOS, QUESTION = 0, 1, 2
FIRST_FILLER, FILLERS = 3, 29
FIRST_KEY, KEYS = 32, 224
#: Value ``n`` of slot ``s`` is token ``FIRST_VALUE + s * SLOT_VALUES + n``.
FIRST_VALUE, SLOTS, SLOT_VALUES = 256, 8, 32
VOCABULARY = FIRST_VALUE + SLOTS * SLOT_VALUES

ENTRY_TOKENS = 1 + SLOTS
QUESTION_TOKENS = 2 + SLOTS


def words() -> list[str]:
    """The text of each token, by id."""
    fillers = [f"f{n}" for n in range(FILLERS)]
    keys = [f"k{n}" for n in range(KEYS)]
    values = [f"v{slot}.{n}" for slot in range(SLOTS) for n in range(SLOT_VALUES)]
    return ["<bos>", "<eos>", "?", *fillers, *keys, *values]


def sequence(rng: np.random.Generator, tokens: int, entries: int, questions: int) -> np.ndarray:
    """``tokens`` ids: BOS, ``entries`` in random order amid filler, then ``questions`` with answers.

    Raises ValueError if they do not fit or ``entries`` exceeds the number of keys.
    """
    filler = tokens - 1 - entries * ENTRY_TOKENS - questions * QUESTION_TOKENS
    if filler < 0 or not 1 <= entries <= KEYS:
        raise ValueError(f"{entries} entries and {questions} questions in {tokens} tokens")
    keys = FIRST_KEY + rng.permutation(KEYS)[:entries]
    values = FIRST_VALUE + rng.integers(0, SLOT_VALUES, (entries, SLOTS)) + SLOT_VALUES * np.arange(SLOTS)
    table = np.concatenate([keys[:, None], values], axis=1)
    is_entry = rng.permutation(np.arange(entries + filler) < entries)
    widths = np.where(is_entry, ENTRY_TOKENS, 1)
    ends = np.cumsum(widths)
    document = FIRST_FILLER + rng.integers(0, FILLERS, entries * ENTRY_TOKENS + filler)
    first = (ends - widths)[is_entry]
    document[first[:, None] + np.arange(ENTRY_TOKENS)] = table
    asked = table[rng.integers(0, entries, questions)]
    marks = np.full((questions, 1), QUESTION)
    return np.concatenate([[BOS], document, np.concatenate([marks, asked], axis=1).reshape(-1)])


def recall_prompt(
    seed: int, tokens: int, *, entries: int | None = None, questions: int = 3
) -> tuple[list[int], list[int]]:
    """A prompt of exactly ``tokens`` ids that ends with an open question, and its eight answer ids.

    ``entries`` defaults to as many as fill about half of the prompt; ``questions`` counts
    the open one. Raises ValueError if ``tokens`` is too small (70 is enough).
    """
    if entries is None:
        entries = max(1, min(KEYS, (tokens // 2) // ENTRY_TOKENS))
    ids = sequence(np.random.default_rng(seed), tokens + SLOTS, entries, questions)
    return ids[:-SLOTS].tolist(), ids[-SLOTS:].tolist()
