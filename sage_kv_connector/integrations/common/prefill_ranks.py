# SPDX-License-Identifier: Apache-2.0
"""Where a prefill engine's ranks listen, and which of them a decode rank reads from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from sage_kv_connector.contract.bootstrap_room import MetadataKind
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.engine import order_addresses
from sage_kv_connector.integrations.common.rank_map import ReadFrom, map_ranks, unread_ranks


class PrefillRank(msgspec.Struct, frozen=True):
    """One rank's transport: the addresses it listens on, best first, and the node it is on."""

    engine_id: str
    rank: int
    addresses: tuple[str, ...]
    node: str


class PrefillEngine(msgspec.Struct, frozen=True):
    """All ranks of one prefill engine, stage by stage, in a stage by tensor parallel rank.

    ``metadata``: what it offers beside the pages of a room, if anything.
    """

    ranks: tuple[PrefillRank, ...]
    pp_size: int = 1
    metadata: MetadataKind | None = None

    def __post_init__(self) -> None:
        if not self.ranks or self.pp_size < 1 or len(self.ranks) % self.pp_size:
            raise ValueError(f"pp_size is {self.pp_size}, must divide the {len(self.ranks)} ranks")

    @property
    def tp_size(self) -> int:
        return len(self.ranks) // self.pp_size


class DecodeRank(NamedTuple):
    """Who reads: its tensor parallel rank, of how many, the kv heads of the whole model, its pipeline stage."""

    tp_rank: int
    tp_size: int
    total_heads: int
    stage: int = 0
    stages: int = 1


class ReadPeer(NamedTuple):
    """A prefill rank, and how many decode ranks read from it (0: none, it must be told)."""

    peer: PeerAddress
    consumers: int


def read_peers(decode: DecodeRank, prefill: PrefillEngine, enabled: tuple[str, ...]) -> list[ReadPeer]:
    """Whom this decode rank reads from; rank 0 of a stage also has those that nobody reads, to tell them.

    One stage reads those of all prefill's stages; with several each reads the stage of its number. Raises ValueError
    naming both sizes where heads can't be divided over the ranks, or stages do not match.
    """
    stages, count = prefill.pp_size, len(prefill.ranks)
    if decode.stages not in (1, stages):
        raise ValueError(
            f"pp_size: {decode.stages} here, {stages} at prefill; here it must be 1 or as many (incompatible)"
        )
    reads = map_ranks(decode.tp_rank, decode.tp_size, count, stages, decode.total_heads)
    if decode.tp_rank == 0:
        reads += [
            ReadFrom(rank, 0) for rank in unread_ranks(decode.tp_size, count, stages, decode.total_heads)
        ]
    return [
        ReadPeer(_address(prefill.ranks[rank], enabled), consumers)
        for rank, consumers in reads
        if decode.stages == 1 or rank // prefill.tp_size == decode.stage
    ]


def _address(rank: PrefillRank, enabled: tuple[str, ...]) -> PeerAddress:
    return PeerAddress(rank.engine_id, rank.rank, order_addresses(rank.addresses, rank.node, enabled))


def ranks_of(engine_id: str, addresses: Mapping[int, tuple[str, ...]], node: str) -> tuple[PrefillRank, ...]:
    """The ranks of an engine whose ranks share one id and one node. Raises ValueError if one is missing."""
    for rank in range(len(addresses)):
        if rank not in addresses:
            raise ValueError(f"ranks {sorted(addresses)} are named, rank {rank} is missing")
    return tuple(PrefillRank(engine_id, rank, addresses[rank], node) for rank in range(len(addresses)))
