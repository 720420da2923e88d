# SPDX-License-Identifier: Apache-2.0
"""What the connector's two halves tell each other; pickled by vLLM's executors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
)

from sage_kv_connector.contract.prompt import Prompt, PromptDigest
from sage_kv_connector.contract.trace import TraceContext
from sage_kv_connector.engine import GroupPages
from sage_kv_connector.integrations.vllm.remote_prefill import RemotePrefill
from sage_kv_connector.integrations.vllm.request_trace import NO_TRACE, LoadTrace

#: What workers tell the scheduler's half; releases before 0.18 have no such way.
KVConnectorWorkerMetadata: Any = getattr(base, "KVConnectorWorkerMetadata", object)
#: The hold of a finished prefill whose blocks vLLM keeps itself.
VLLM_HOLDS = 0
#: Page ids of the kv groups that take part in transfers.
PageTables = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Load:
    """Fetch pages: those of each kv group that has some to fill, as the transport takes them; of this prompt only.

    ``trace``: where it stands in the request's trace.
    """

    request_id: str
    remote: RemotePrefill
    pages: tuple[GroupPages, ...]
    prompt: PromptDigest
    trace: LoadTrace = NO_TRACE


@dataclass(frozen=True)
class Unneeded:
    """Nothing of what prefill has for this prompt is needed."""

    request_id: str
    remote: RemotePrefill
    prompt: PromptDigest


@dataclass(frozen=True)
class Offered:
    """A prefill is on offer from now on. ``family``: its router's id for it, and maybe for others of its request.

    ``exact``: the KV can't be had for fewer tokens (recurrent states). ``trace``: the context that its request brought.
    """

    request_id: str
    transfer_id: str
    family: str
    prompt: Prompt
    exact: bool
    trace: TraceContext | None = None


@dataclass(frozen=True)
class Progress:
    """A step of a prefill on offer: what its block tables got since its last one, and what is final once it ran.

    ``tokens_after``: the first so many tokens are computed then. ``complete``: they are the whole prompt, so its
    last, partial page is final too.
    """

    request_id: str
    transfer_id: str
    new_page_ids: PageTables
    tokens_after: int
    complete: bool


@dataclass(frozen=True)
class Finished:
    """A prefill ended well; its pages are held until they were fetched or the lease is over.

    ``hold``: what their end is reported by (``held_blocks.py``); for ``VLLM_HOLDS`` by the request. ``first_token``:
    what it generated, for decode in an engine that does not sample it itself.
    """

    request_id: str
    transfer_id: str
    page_ids: PageTables
    tokens: int
    hold: int = VLLM_HOLDS
    first_token: int | None = None


@dataclass
class SageKVConnectorMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """One step's orders from the scheduler's half to each worker's.

    ``given_up``: ids that decode may wait for already, and that won't be on offer. ``void``: why KV that waits to be
    handed over is void, "" if it is not. ``weights``: what vLLM calls the weights that it has had since its last step,
    "" for the same as before. These come before the other orders. ``idle``: the step computes nothing and ends no
    request, so that nobody waits for its end. ``unpaired``: new requests that ask for no hand-over.
    """

    loads: list[Load] = field(default_factory=list)
    cancelled_loads: list[str] = field(default_factory=list)
    releases: list[Unneeded] = field(default_factory=list)
    expected: list[RemotePrefill] = field(default_factory=list)
    no_longer_expected: list[str] = field(default_factory=list)
    offers: list[Offered] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    withdrawn: list[str] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)
    void: str = ""
    weights: str = ""
    idle: bool = False
    unpaired: int = 0

    @property
    def wants_step(self) -> bool:
        """Orders that no scheduled request carries still have to reach the workers."""
        return bool(
            self.offers
            or self.releases
            or self.expected
            or self.no_longer_expected
            or self.withdrawn
            or self.given_up
            or self.void
            or self.weights
        )


@dataclass
class SageKVWorkerMetadata(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What workers report of a step beside vLLM's own results: holds that are over → the ranks that say so."""

    released: dict[int, frozenset[int]]

    def aggregate(self, other: SageKVWorkerMetadata) -> SageKVWorkerMetadata:
        """Both reports as one."""
        numbers = self.released.keys() | other.released.keys()
        nobody: frozenset[int] = frozenset()
        return SageKVWorkerMetadata(
            {i: self.released.get(i, nobody) | other.released.get(i, nobody) for i in numbers}
        )


@dataclass
class SageKVHandshakeMetadata(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """What a worker's transport listens on."""

    addresses: tuple[str, ...]
    node: str
    schema_digest: str
