# SPDX-License-Identifier: Apache-2.0
"""What KV depends on beside the model: the prompt, as a digest that two servers compute each for itself.

The digest of the first N tokens covers their ids, the cache salt, the adapter, the multimodal items that begin among
them with their places, and embeddings given instead of tokens. So KV is handed to a prompt that continues the one
it was computed for, and to no other. Layout of what is hashed: docs/protocol.md.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

#: Bytes of a digest, of SHA-256's 32.
DIGEST_BYTES = 16
_TAG = b"sage_kvt prompt 2\0"
_CHUNKS_TAG = b"sage_kvt chunks 1\0"


class PromptDigest(msgspec.Struct, frozen=True, array_like=True):
    """The first ``tokens`` tokens of a prompt. An empty ``digest``: nothing is known but, if positive, their number."""

    tokens: int = 0
    digest: bytes = b""


#: Of transfers that are no prompt's KV, or whose engine tells nothing of the prompt.
UNBOUND = PromptDigest()


class PromptItem(NamedTuple):
    """An image, a sound: where its placeholder tokens begin, how many they are, and the hash of its content."""

    offset: int
    length: int
    identity: str


class Prompt:
    """A whole prompt. ``tokens``: how many it has.

    ``embeddings``: for each position 16 bytes of the hash of its embedding, zeros where there is a token; empty
    where there are tokens only. ``adapter``: what identifies the adapter's weights, not the server's name or number.
    """

    def __init__(
        self,
        token_ids: Sequence[int],
        *,
        salt: str = "",
        adapter: str = "",
        items: Sequence[PromptItem] = (),
        embeddings: bytes = b"",
    ) -> None:
        self.tokens = len(token_ids)
        self._ids = _packed(token_ids)
        self._context = _texts(salt, adapter)
        self._items = tuple(items)
        self._embeddings = embeddings
        self._last = UNBOUND

    def digest(self, tokens: int) -> PromptDigest:
        """Of the first ``tokens`` tokens. Raises ValueError where there are fewer."""
        if not 0 <= tokens <= self.tokens:
            raise ValueError(f"tokens is {tokens}, allowed: 0 to {self.tokens}")
        if self._last.tokens != tokens or not self._last.digest:
            self._last = PromptDigest(tokens, self._compute(tokens))
        return self._last

    def chunks(self, tokens: int, most: int) -> tuple[PromptDigest, ...]:
        """Of its first ``most`` whole chunks of ``tokens`` tokens: each digest covers the prompt up to the chunk's end.

        They say which prompts begin alike, and are not those that ``digest`` gives.
        """
        found, hashed = [], hashlib.sha256(_CHUNKS_TAG + self._context)
        for end in range(tokens, min(self.tokens, tokens * most) + 1, tokens):
            begin = end - tokens
            hashed.update(memoryview(self._ids)[begin:end])
            for item in self._items:
                if begin <= item.offset < end:
                    hashed.update(item.offset.to_bytes(8, "little") + _texts(item.identity))
            hashed.update(self._embeddings[16 * begin : 16 * end])
            found.append(PromptDigest(end, hashed.copy().digest()[:DIGEST_BYTES]))
        return tuple(found)

    @property
    def whole(self) -> PromptDigest:
        return self.digest(self.tokens)

    def _compute(self, tokens: int) -> bytes:
        hashed = hashlib.sha256(_TAG + tokens.to_bytes(8, "little") + self._context)
        hashed.update(memoryview(self._ids)[:tokens])
        for item in self._items:
            if item.offset < tokens:
                place = item.offset.to_bytes(8, "little") + item.length.to_bytes(8, "little")
                hashed.update(place + _texts(item.identity))
        if self._embeddings:
            hashed.update(b"embeddings" + self._embeddings[: 16 * tokens])
        return hashed.digest()[:DIGEST_BYTES]


def _packed(token_ids: Sequence[int]) -> array[int]:
    """4 bytes an id, little-endian: much faster to make and to hash than 8."""
    try:
        packed = array("I", token_ids)
    except OverflowError:  # no token has such an id; still a client may name one
        packed = array("I", [token_id & 0xFFFFFFFF for token_id in token_ids])
    if sys.byteorder != "little":
        packed.byteswap()
    return packed


def _texts(*texts: str) -> bytes:
    """Each with its length before it."""
    encoded = [text.encode() for text in texts]
    return b"".join(len(text).to_bytes(8, "little") + text for text in encoded)
