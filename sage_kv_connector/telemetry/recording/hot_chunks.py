# SPDX-License-Identifier: Apache-2.0
"""Which chunks of prompts are handed over again and again, in bounded memory (the Misra-Gries summary).

A chunk is known by the digest of the prompt up to its end. A count may be too low by at most the number of hand-overs
of chunks over ``MOST``; whatever makes up more than one in ``MOST`` of them is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import nlargest

from sage_kv_connector.contract.prompt import PromptDigest
from sage_kv_connector.telemetry.recording.snapshot import HotChunk

MOST = 1024
#: Of one prompt: its first chunks, which prompts have in common.
CHUNK_TOKENS, MOST_OF_A_PROMPT = 256, 64


class HotChunks:
    """Of one engine. One thread at a time."""

    def __init__(self) -> None:
        self._counts: dict[PromptDigest, int] = {}

    def add(self, chunks: Iterable[PromptDigest]) -> None:
        """They were handed over once more."""
        for chunk in chunks:
            if chunk in self._counts or len(self._counts) < MOST:
                self._counts[chunk] = self._counts.get(chunk, 0) + 1
            else:
                self._counts = {known: count - 1 for known, count in self._counts.items() if count > 1}

    def hottest(self, most: int) -> tuple[HotChunk, ...]:
        """The hottest first."""
        found = nlargest(most, self._counts.items(), key=lambda item: item[1])
        return tuple(HotChunk(chunk.digest.hex(), chunk.tokens, count) for chunk, count in found)
