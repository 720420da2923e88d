# SPDX-License-Identifier: Apache-2.0
"""What the two sides of a session come to: how bytes travel, and whether KV may."""

from __future__ import annotations

from typing import NamedTuple

from sage_kv_connector.backends.base import Capabilities, ConnectionInfo
from sage_kv_connector.config import KVTransportConfig, Security
from sage_kv_connector.contract.failure import Code, Reason
from sage_kv_connector.contract.plan import TransportPlan
from sage_kv_connector.contract.schema import KVCacheSchema, Verdict


class SchemaVerdict(NamedTuple):
    """``refusal``: why no KV may move; ``must_convert``: why pages can't go as they are.

    ``no_kv_of``: layers of ours that the peer does not have, and that come without KV.
    """

    refusal: Reason | None = None
    must_convert: str = ""
    no_kv_of: tuple[str, ...] = ()


def schema_verdict(
    ours: KVCacheSchema | None, theirs: KVCacheSchema | None, capabilities: Capabilities
) -> SchemaVerdict:
    """Whether KV may move between two caches over this backend, and how."""
    if ours is None or theirs is None:
        return SchemaVerdict()
    comparison = ours.compare(theirs)
    if comparison.verdict is Verdict.INCOMPATIBLE:
        wrong = {field.field for field in comparison.differences if field.verdict is Verdict.INCOMPATIBLE}
        code = Code.WEIGHTS if wrong == {"weights"} else Code.SCHEMA
        return SchemaVerdict(Reason(code, comparison.explain()))
    if comparison.verdict is Verdict.CONVERTIBLE:
        return SchemaVerdict(must_convert=comparison.explain(), no_kv_of=ours.missing_from(theirs))
    if ours.memory == "host" or capabilities.device_memory:
        return SchemaVerdict()
    return SchemaVerdict(must_convert=f"memory: {ours.memory} on both sides, {capabilities.name} takes host")


def plan_session(
    backend: str, info: ConnectionInfo, config: KVTransportConfig, security: Security = "none"
) -> TransportPlan:
    """What applies to every transfer of one session."""
    checksum = {"crc": True, "generation": False, "auto": info.crosses_wire}[config.integrity]
    return TransportPlan(
        backend=backend,
        mode=info.mode,
        reason=info.reason,
        lanes=info.lanes,
        checksum=checksum,
        security=security,
    )
