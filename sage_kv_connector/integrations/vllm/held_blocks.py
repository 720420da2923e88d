# SPDX-License-Identifier: Apache-2.0
"""The blocks of finished prefills, from the end of the request until decode needs them no more.

While vLLM itself keeps the blocks of a request for a connector it steps without pause, though there is nothing to
compute. From 0.30 on it gives its connectors the block pool, so there the blocks are held here. Life of a held block:

1. The request ends, and ``hold`` takes one more reference to each block of its prompt. vLLM frees the request as any
   other one and stops stepping; the block can't be evicted or given to another request.
2. The ``Finished`` order names the hold to the workers. Each rank reports it once, when nothing reads its pages any
   more: fetched, lease over, or given up.
3. Every rank of the engine has reported it: ``hear`` gives the reference back.

What the workers know comes with a step, and nobody orders one only to hear it. So for a while after a prefill ended
``wants_step`` asks for steps, as decode usually fetches at once. What is fetched later is freed with the next step,
whatever it is for: a request that waits for blocks makes one too.

Older releases hold the request themselves until all workers named it (``VLLM_HOLDS``).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from sage_kv_connector.integrations.vllm.metadata import VLLM_HOLDS, PageTables, SageKVWorkerMetadata

#: How long vLLM goes on stepping for a prefill that ended and is not fetched yet.
LINGER_S = 1.0


class _Hold(NamedTuple):
    transfer_id: str
    blocks: list[Any]
    since: float
    ranks: set[int]  #: that are still to report it


class HeldBlocks:
    """Lives in vLLM's scheduler process; every method is called on its thread. ``ranks``: workers of the engine."""

    def __init__(self, groups: list[tuple[int, Any]], ranks: int) -> None:
        self._groups = groups
        self._ranks = ranks
        self._manager: Any = None
        self._holds: dict[int, _Hold] = {}
        self._last = VLLM_HOLDS
        self._of_vllm: dict[str, str] = {}
        self._stepped = 0.0
        self._clock = time.monotonic
        #: vLLM waits for all that it has to end, to pause or to shut down.
        self.draining = False

    def bind(self, manager: Any) -> None:
        """vLLM's KVCacheManager, whose blocks are held from now on."""
        self._manager = manager

    def hold(self, request_id: str, transfer_id: str, tables: PageTables, tokens: int) -> int:
        """Hold the pages of a prompt of so many tokens; returns the hold, ``VLLM_HOLDS`` where that is vLLM's to do."""
        if self._manager is None:
            self._of_vllm[request_id] = transfer_id
            return VLLM_HOLDS
        blocks = list(self._of_prompt(self._manager.get_blocks(request_id).blocks, tables, tokens))
        self._manager.block_pool.touch(blocks)
        self._last += 1
        self._holds[self._last] = _Hold(transfer_id, blocks, self._clock(), set(range(self._ranks)))
        return self._last

    def hear(self, output: Any) -> list[str]:
        """Of a step's KVConnectorOutput: free what all ranks reported; returns the transfers that are over."""
        sent = [self._of_vllm.pop(i) for i in output.finished_sending or () if i in self._of_vllm]
        report = getattr(output, "kv_connector_worker_meta", None)
        reported = report.released if isinstance(report, SageKVWorkerMetadata) else {}
        for number, ranks in reported.items():
            hold = self._holds.get(number)
            if hold is None:
                continue  # a report may come twice
            hold.ranks.difference_update(ranks)
            if not hold.ranks:
                del self._holds[number]
                # As vLLM frees a request: the end of a prompt is evicted before what it begins with.
                self._manager.block_pool.free_blocks(reversed(hold.blocks))
                sent.append(hold.transfer_id)
        return sent

    def stepped(self) -> None:
        """A step is made, and brings what the workers have to report."""
        self._stepped = self._clock()

    def wants_step(self) -> bool:
        """Whether vLLM shall step to hear of the workers, though it has nothing else to do.

        vLLM asks before it falls asleep and when something woke it up. So a step is made when the last one is long
        ago: what was fetched meanwhile is free before vLLM does what it was woken up for once more (a reset).
        """
        if not self._holds:
            return False
        now = self._clock()
        newest = next(reversed(self._holds.values()))
        return self.draining or now - newest.since < LINGER_S or now - self._stepped >= LINGER_S

    def _of_prompt(self, blocks: Any, tables: PageTables, tokens: int) -> Iterator[Any]:
        """The blocks that workers may read; ``blocks``: all of the request, by vLLM's group."""
        for (group_id, group), page_ids in zip(self._groups, tables, strict=True):
            pages = -(-tokens // int(group.kv_cache_spec.block_size))
            for block, page_id in zip(blocks[group_id][:pages], page_ids, strict=False):
                if page_id and not block.is_null:
                    yield block
