# SPDX-License-Identifier: Apache-2.0
"""``InferenceBackend``: what an inference engine does so that SAGE can split prefill from decode over it.

A backend is one engine in one process. ``prefill`` and ``decode`` of two backends, anywhere, make one
answer: what ``prefill`` returns is plain data for the other's ``decode``, and the KV goes from engine
to engine by the transport, not through the caller. Adapters: ``vllm_backend``, ``sglang_backend``.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple, Protocol, runtime_checkable

from sage_kv_connector.backends.native import default_lanes
from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.peer import RegisteredKV
from sage_kv_connector.contract.plan import TransportPlan
from sage_kv_connector.contract.schema import KVCacheSchema, Verdict
from sage_kv_connector.engine import (
    SAME,
    capabilities_of,
    enabled_backends,
    order_addresses,
    planned_wire_dtype,
)

#: Name → module and class of its adapter.
ADAPTERS = {
    "vllm": ("sage_kv_connector.integrations.sage.vllm_backend", "VllmBackend"),
    "sglang": ("sage_kv_connector.integrations.sage.sglang_backend", "SglangBackend"),
}


class BackendUnavailable(RuntimeError):
    """An adapter that can't run here; the text says what is missing."""


class IncompatibleCaches(ValueError):
    """Two engines' KV caches can't exchange pages; the text names each field and both values."""


class HandoverError(RuntimeError):
    """KV that did not come to an engine that can't compute the prompt itself; the text says why."""


class Prefilled(NamedTuple):
    """A prompt whose KV waits at the engine that computes it. ``handover`` is JSON-able and opaque.

    ``first_token`` is None where the engine tells it to decode alone (SGLang, which may still be
    computing the prompt); ``Decoded.token_ids`` begin with it in any case.
    """

    request_id: str
    prompt: tuple[int, ...]
    first_token: int | None
    handover: dict[str, Any]


class Decoded(NamedTuple):
    """An answer. ``token_ids`` begin with the first token."""

    request_id: str
    token_ids: tuple[int, ...]


@runtime_checkable
class InferenceBackend(Protocol):
    """One engine. Methods block; they may be called from one thread at a time."""

    def register_kv(self) -> list[RegisteredKV]:
        """Have every rank's KV cache known to the transport; what they are, by rank. Idempotent."""
        ...

    def prefill(self, request_id: str, prompt: Sequence[int]) -> Prefilled:
        """Have the KV of token ids computed and put on offer, for a lease.

        May return before it is computed; if it fails later, decode says so. Raises ValueError for an
        empty prompt, and on an engine that only decodes.
        """
        ...

    def decode(self, prefilled: Prefilled, max_tokens: int) -> Decoded:
        """Fetch the KV and continue, greedily.

        If it does not come, the engine computes the prompt itself, or raises HandoverError if it can't
        (SGLang). Raises ValueError for a handover of another kind, and on an engine that only prefills.
        """
        ...

    def transport_plan(self, peer: RegisteredKV) -> TransportPlan:
        """How KV would come here from ``peer``. Raises IncompatibleCaches, and ValueError if nothing reaches it."""
        ...

    def close(self) -> None:
        """Stop the engine; what is on offer is gone. Idempotent."""
        ...


def create_backend(name: str, model: str, config: KVTransportConfig | None = None, **options: Any) -> Any:
    """An engine by name, started; ``options`` are the engine's own, with ``role`` for sglang.

    Raises ValueError for an unknown name, BackendUnavailable for an engine that is not installed.
    """
    if name not in ADAPTERS:
        raise ValueError(f"inference backend {name!r} is unknown; allowed: {', '.join(ADAPTERS)}")
    module, adapter = ADAPTERS[name]
    return getattr(import_module(module), adapter)(model, config or KVTransportConfig(), **options)


def plan_between(here: KVCacheSchema, peer: RegisteredKV, config: KVTransportConfig) -> TransportPlan:
    """What the handshake will settle, foretold from both schemas and the peer's addresses.

    ``mode`` is only known once two processes met ("" here). Raises as ``transport_plan``.
    """
    compared = here.compare(peer.schema)
    if compared.verdict is Verdict.INCOMPATIBLE:
        raise IncompatibleCaches(compared.explain())
    enabled = enabled_backends(config)
    usable = order_addresses(peer.addresses, peer.node, enabled)
    if not usable:
        raise ValueError(
            f"peer {peer.engine_id} listens on {', '.join(peer.addresses) or 'nothing'}; none of it can "
            f"be reached with backend {', '.join(enabled)} from here"
        )
    best = capabilities_of(usable[0])
    wire = planned_wire_dtype(here, peer.schema, config.target_dtype, device_memory=best.device_memory)
    converts = wire != SAME
    staged = converts or best.crosses_nodes or not config.zero_copy
    return TransportPlan(
        backend=best.name,
        mode="",
        reason=compared.explain() if converts else "",
        lanes=config.overlap_streams or default_lanes(),
        checksum={"crc": True, "generation": False, "auto": staged}[config.integrity],
        wire_dtype=wire,
    )
