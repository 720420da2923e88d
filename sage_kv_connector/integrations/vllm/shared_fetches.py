# SPDX-License-Identifier: Apache-2.0
"""Decode requests that begin alike fetch what they share once: a later one waits, and finds it in vLLM's prefix cache.

vLLM's hash of a page is that of everything before it too, so two requests share as many pages as they have equal
hashes. Without this, ten questions about one document that come together would fetch it ten times.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from typing import Any, NamedTuple

from sage_kv_connector.integrations.vllm.remote_prefill import RemotePrefill
from sage_kv_connector.integrations.vllm.specs import recurrent, sliding_window

logger = logging.getLogger(__name__)


class _Fetch(NamedTuple):
    """``hashes``: of the full pages that are being fetched, the first of which has the number ``first``."""

    remote: RemotePrefill
    first: int
    hashes: list[Any]

    def shared(self, hashes: list[Any], first: int) -> int:
        """How many pages from ``first`` on are among these."""
        ahead = first - self.first
        pages = min(len(self.hashes) - ahead, len(hashes) - first)
        if ahead < 0 or pages <= 0:
            return 0
        return bisect_left(
            range(pages), True, key=lambda page: self.hashes[ahead + page] != hashes[first + page]
        )

    def is_as_soon_as(self, other: RemotePrefill) -> bool:
        """Whether its KV is there, or comes from where the other's comes from, which was asked later."""
        mine = (self.remote.prefill, self.remote.place)
        return self.remote.finished or mine == (other.prefill, other.place)


class SharedFetches:
    """Of one scheduler; fetches that end are remembered for a step, since vLLM caches their pages in the next one."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        groups = kv_cache_config.kv_cache_groups
        specs = [group.kv_cache_spec for group in groups]
        plain = len(specs) == 1 and not recurrent(specs[0]) and not sliding_window(specs[0])
        cached = bool(getattr(vllm_config.cache_config, "enable_prefix_caching", False))
        self._page_tokens = int(specs[0].block_size) if plain and cached else 0
        self._fetches: dict[str, _Fetch] = {}
        self._ended: set[str] = set()
        self._waiting: set[str] = set()

    def begins(self, request: Any, remote: RemotePrefill, first_token: int, tokens: int) -> None:
        """Tokens [first_token, tokens) of it are fetched from now on."""
        self._waiting.discard(request.request_id)
        hashes = self._hashes(request)
        if hashes:
            first = first_token // self._page_tokens
            pages = hashes[first : tokens // self._page_tokens]
            self._fetches[request.request_id] = _Fetch(remote, first, pages)

    def ends(self, request_id: str) -> None:
        """Its pages landed, it failed, or nobody wants it any more. Idempotent."""
        self._waiting.discard(request_id)
        if request_id in self._fetches:
            self._ended.add(request_id)

    def stepped(self) -> None:
        """vLLM has scheduled once more."""
        for request_id in self._ended:
            del self._fetches[request_id]
        self._ended.clear()

    def waits(self, request: Any, remote: RemotePrefill, computed: int, tokens: int) -> bool:
        """Whether it had better wait: at least a half of what it lacks is being fetched, and little besides."""
        hashes = self._hashes(request) if self._fetches else []
        if not hashes:
            return False
        first = computed // self._page_tokens
        wanted = tokens // self._page_tokens - first
        if wanted <= 0:
            return False
        for request_id, fetch in self._fetches.items():
            if not fetch.is_as_soon_as(remote):
                continue
            shared = fetch.shared(hashes, first)
            if shared and 2 * shared >= max(wanted, len(fetch.hashes)):
                self._tell(request.request_id, request_id, shared)
                return True
        return False

    def _tell(self, request_id: str, fetching: str, shared: int) -> None:
        if request_id not in self._waiting:
            self._waiting.add(request_id)
            logger.debug("request %s waits for %d pages that %s fetches", request_id, shared, fetching)

    def _hashes(self, request: Any) -> list[Any]:
        """One for each full page; none where vLLM hashes other lengths."""
        if not self._page_tokens:
            return []
        hashes: list[Any] = getattr(request, "block_hashes", [])
        return hashes if len(hashes) == int(request.num_prompt_tokens) // self._page_tokens else []
