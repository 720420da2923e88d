# SPDX-License-Identifier: Apache-2.0
"""``sage_kvt`` of ``sagellm.comm_backends``: sageLLM's CommBackend on the transport engine.

``send`` and ``recv`` are what ``sagellm_kv_cache.transfer.KVTransferEngine`` and
``sagellm_core.pd.KVTransferChannel`` move KV with. The collectives are made of them, through one
rank, so that nothing of the interface is missing; tensor parallelism wants gloo, NCCL or HCCL.

Life: construct → ``init`` (all ranks come together) or ``join`` (they are told) → … → ``destroy``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from sagellm_comm import CommBackend, CommBackendType, CommGroup, CommOp

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.chunk import DeviceSpec
from sage_kv_connector.integrations.sage.point_to_point import MessageError, PointToPoint
from sage_kv_connector.integrations.sage.rendezvous import RendezvousError, meet

logger = logging.getLogger(__name__)

NAME = "sage_kvt"


def create_sage_kvt_backend() -> SageKvtCommBackend:
    """The entry point: options from the file that ``$SAGE_KVT_CONFIG_FILE`` names, else the defaults."""
    return SageKvtCommBackend(KVTransportConfig.load())


def register() -> None:
    """Make ``sagellm_comm.get_comm_backend("sage_kvt")`` work. Idempotent.

    isagellm-comm 0.5.4 declares the entry point group but does not read it: its own backends are
    registered in code, so ours is, too.
    """
    from sagellm_comm import is_comm_backend_available, register_comm_backend

    if not is_comm_backend_available(NAME):
        register_comm_backend(NAME, create_sage_kvt_backend)


class SageKvtCommBackend(CommBackend):  # type: ignore[misc]
    """One rank. Calls block, end within ``deadline_s``, and raise RuntimeError with the reason."""

    def __init__(self, config: KVTransportConfig | None = None) -> None:
        self._config = config or KVTransportConfig()
        if self._config.target_dtype != "auto":
            logger.warning(
                "target_dtype=%s: send and recv move tensors as they are; only pages that a KV schema "
                "describes are converted (vLLM)",
                self._config.target_dtype,
            )
        self._ranks: PointToPoint | None = None
        self._world: tuple[int, ...] = ()

    # -- life

    def open(self, rank: int) -> DeviceSpec:
        """Listen as ``rank``; the answer is for the others' ``join``. ``init`` does both. Raises RuntimeError twice."""
        if self._ranks is not None:
            raise RuntimeError(f"this backend is rank {self._ranks.rank} already; destroy it first")
        self._ranks = PointToPoint(self._config, rank)
        return self._ranks.spec

    def join(self, table: Mapping[int, DeviceSpec]) -> None:
        """Where all ranks are, for those who exchange it by themselves. Raises ValueError."""
        ranks = self._open()
        if ranks.rank not in table or sorted(table) != list(range(len(table))):
            raise ValueError(f"ranks {sorted(table)} must be 0 to {len(table) - 1}, with {ranks.rank} in it")
        ranks.join(dict(table))
        self._world = tuple(sorted(table))

    def init(self, rank: int, world_size: int, master_addr: str, master_port: int) -> None:
        """Come together with all ranks at rank 0's address. Raises RuntimeError within ``deadline_s``."""
        secret = self._config.resolved_secret()
        spec = self.open(rank)
        try:
            self.join(meet(rank, world_size, master_addr, master_port, spec, secret, self._config.deadline_s))
        except (RendezvousError, ValueError, OSError) as error:
            self.destroy()
            raise RuntimeError(
                f"rank {rank} of {world_size} at {master_addr}:{master_port}: {error}"
            ) from error

    def destroy(self) -> None:
        """End everything under way. Idempotent."""
        ranks, self._ranks, self._world = self._ranks, None, ()
        if ranks is not None:
            ranks.close()

    # -- between two ranks

    def send(self, tensor: Any, dst_rank: int) -> None:
        """Returns when the bytes are in the other rank's memory and hold. Raises MessageError, ValueError."""
        self._open().send(tensor, dst_rank)

    def recv(self, tensor: Any, src_rank: int) -> None:
        """Fills ``tensor``; an empty bytearray grows to what comes. Raises MessageError, ValueError."""
        self._open().recv(tensor, src_rank)

    def get_rank(self) -> int:
        return self._open().rank

    def get_world_size(self) -> int:
        self._open()
        return len(self._world)

    def counters(self) -> dict[str, int]:
        """Totals of the data plane, and what is registered now."""
        return self._open().counters()

    # -- among several

    def create_group(self, ranks: Sequence[int], group_id: str | None = None) -> CommGroup:
        """A subset of the ranks. Raises ValueError naming those that there are."""
        unknown = sorted(set(ranks) - set(self._world))
        if not ranks or unknown or len(set(ranks)) != len(ranks):
            raise ValueError(
                f"ranks is {list(ranks)}; allowed: one or more of {list(self._world)}, each once"
            )
        ordered = sorted(ranks)
        name = group_id or "sage_kvt-" + "-".join(map(str, ordered))
        # The enumeration has no word for others; GLOO says that host memory and a network carry it.
        return CommGroup(
            group_id=name, ranks=ordered, world_size=len(ordered), backend_type=CommBackendType.GLOO
        )

    def broadcast(self, tensor: Any, src_rank: int, group: CommGroup | None = None) -> Any:
        """Copy ``tensor`` of ``src_rank`` to all; in place."""
        ranks, me = self._members(group), self.get_rank()
        if src_rank not in ranks:
            raise ValueError(f"src_rank is {src_rank}; allowed: {list(ranks)}")
        if me == src_rank:
            for rank in ranks:
                if rank != me:
                    self.send(tensor, rank)
        else:
            self.recv(tensor, src_rank)
        return tensor

    def all_gather(self, tensor: Any, group: CommGroup | None = None) -> list[Any]:
        """Everybody's tensor, by rank; all have the same shape and dtype."""
        import torch

        ranks, me = self._members(group), self.get_rank()
        gathered = [torch.empty_like(tensor) for _ in ranks]
        gathered[ranks.index(me)].copy_(tensor)
        for one, owner in zip(gathered, ranks, strict=True):
            self.broadcast(one, owner, group)
        return gathered

    def all_reduce(self, tensor: Any, op: CommOp = CommOp.SUM, group: CommGroup | None = None) -> Any:
        """Reduce over all, in place. The first rank adds up in the order of ranks, so all get equal bits."""
        import torch

        ranks, me = self._members(group), self.get_rank()
        root = ranks[0]
        if me == root:
            other = torch.empty_like(tensor)
            for rank in ranks[1:]:
                self.recv(other, rank)
                _reduce(tensor, other, op)
            if op is CommOp.AVG:
                tensor /= len(ranks)
        else:
            self.send(tensor, root)
        return self.broadcast(tensor, root, group)

    def barrier(self, group: CommGroup | None = None) -> None:
        """Returns when all ranks have called it."""
        ranks, me = self._members(group), self.get_rank()
        token = bytearray(1)
        if me == ranks[0]:
            for rank in ranks[1:]:
                self.recv(token, rank)
        else:
            self.send(token, ranks[0])
        self.broadcast(token, ranks[0], group)

    # -- inside

    def _open(self) -> PointToPoint:
        if self._ranks is None:
            raise RuntimeError("the backend is not initialised: call init or open first")
        return self._ranks

    def _members(self, group: CommGroup | None) -> list[int]:
        ranks = list(self._world) if group is None else sorted(group.ranks)
        if self.get_rank() not in ranks:
            raise ValueError(f"rank {self.get_rank()} is not in group {ranks}")
        return ranks


def _reduce(tensor: Any, other: Any, op: CommOp) -> None:
    import torch

    if op in (CommOp.SUM, CommOp.AVG):
        tensor += other
    elif op is CommOp.PROD:
        tensor *= other
    elif op is CommOp.MAX:
        torch.maximum(tensor, other, out=tensor)
    elif op is CommOp.MIN:
        torch.minimum(tensor, other, out=tensor)
    else:
        raise ValueError(f"op is {op}; allowed: {', '.join(str(one.value) for one in CommOp)}")


__all__ = ["MessageError", "SageKvtCommBackend", "create_sage_kvt_backend", "register"]
