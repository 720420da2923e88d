# SPDX-License-Identifier: Apache-2.0
"""Which ranks of a prefill engine a decode rank reads from, when their parallel sizes differ.

Rank r of ``size`` tensor parallel ranks holds kv heads ``[r * total // size, …)``; with more
ranks than heads, neighbours hold the same head (a replicated latent is the case of one
head). Pipeline stage s holds some layers; its ranks are ``s * size + r``. Each head is read
once, and replicas share the consumers.
"""

from __future__ import annotations

from typing import NamedTuple


class ReadFrom(NamedTuple):
    """A prefill rank, and how many decode ranks read from it."""

    rank: int
    consumers: int


def head_range(rank: int, size: int, total: int) -> range:
    """The kv heads of one tensor parallel rank."""
    first = rank * total // size
    return range(first, first + max(1, total // size))


def read_ranks(rank: int, size: int, peer_size: int, total: int) -> list[int]:
    """Tensor parallel ranks of the peer that hold what ``rank`` of ``size`` needs, each head once."""
    replicas = max(1, peer_size // total)
    found = []
    for head in head_range(rank, size, total):
        holders = [r for r in range(peer_size) if head in head_range(r, peer_size, total)]
        chosen = holders[rank % replicas % len(holders)]
        if chosen not in found:
            found.append(chosen)
    return found


def map_ranks(rank: int, size: int, peer_ranks: int, peer_stages: int, total: int) -> list[ReadFrom]:
    """What decode rank ``rank`` of ``size`` reads, over all pipeline stages of the peer.

    Raises ValueError, naming both sizes, where heads can't be divided over the ranks.
    """
    peer_size = peer_ranks // peer_stages
    for name, ranks in (("here", size), ("at the peer", peer_size)):
        if total % ranks and ranks % total:
            raise ValueError(f"tp_size: {ranks} {name} does not divide {total} kv heads (incompatible)")
    everyone = [read_ranks(other, size, peer_size, total) for other in range(size)]
    return [
        ReadFrom(stage * peer_size + there, sum(there in reads for reads in everyone))
        for stage in range(peer_stages)
        for there in everyone[rank]
    ]


def unread_ranks(size: int, peer_ranks: int, peer_stages: int, total: int) -> list[int]:
    """Prefill ranks (replicas) that no decode rank reads from; they must be told."""
    peer_size = peer_ranks // peer_stages
    read = {there for rank in range(size) for there in read_ranks(rank, size, peer_size, total)}
    return [s * peer_size + r for s in range(peer_stages) for r in range(peer_size) if r not in read]
