# SPDX-License-Identifier: Apache-2.0
"""Between ``sagellm_protocol``'s types and ours.

What one side can't say is an error that names field, value and what is allowed, never a guess;
the one exception is stated: SAGE's ``fp8`` is read as fp8_e4m3. Types: isagellm-protocol 0.5.4.
"""

from __future__ import annotations

import re
import uuid
from typing import Any, NamedTuple

from sagellm_protocol.backend_types import CapabilityDescriptor, DType
from sagellm_protocol.kv_hooks import KVQoSPolicy
from sagellm_protocol.pd_sep_types import KVTransferRequest, KVTransferResult, KVTransferState

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.chunk import KVChunk, KVCoordinates, Segment
from sage_kv_connector.contract.dtypes import DTYPE_BITS, DTYPES, dtype, dtype_of_engine
from sage_kv_connector.contract.failure import Failure, reason_of_text
from sage_kv_connector.contract.failure_kinds import FAILURE_KINDS
from sage_kv_connector.contract.plan import Outcome, TransferPlan, TransferStats
from sage_kv_connector.contract.schema import CanonicalPlaneSchema, GroupSchema, KVCacheSchema, PlaneSchema
from sage_kv_connector.hardware.probing.profile import Device, HardwareProfile

#: Ours → torch's name, as KVTransferRequest has it.
TORCH_NAMES = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "int8": "int8",
    "int4": "int4",
}
#: Ours → the enumerations KVDType and DType, which know one fp8.
PROTOCOL_NAMES = {
    "fp32": "fp32",
    "fp16": "fp16",
    "bf16": "bf16",
    "fp8_e4m3": "fp8",
    "int8": "int8",
    "int4": "int4",
}
#: QoS tier → priority of a chunk; lower goes first (KVPriority's words, and "default").
TIERS = {"critical": 0, "high": 1, "default": 2, "medium": 2, "low": 3, "background": 4}
#: Vendor → SAGE's device_type.
DEVICE_TYPES = {
    "nvidia": "cuda",
    "ascend": "ascend",
    "cambricon": "mlu",
    "hygon": "dcu",
    "kunlunxin": "xpu",
}
#: What the transport carries between devices, converted or as it is; says nothing about their arithmetic.
MOVED_DTYPES = ("fp32", "fp16", "bf16", "fp8_e4m3")
#: A dense KV cache in a transfer request: one page a token, since the request has no pages.
_PAGE_TOKENS = 1


def dtype_from_sage(word: Any) -> str:
    """Our name of a dtype. Takes torch's names and the members of KVDType and DType. Raises ValueError."""
    text = str(getattr(word, "value", word)).removeprefix("torch.")
    ours = dtype_of_engine(text)
    if ours is None or dtype(ours).kind == "bytes":
        allowed = [name for one in DTYPES if one.kind != "bytes" for name in (*one.aliases, one.name)]
        raise ValueError(f"dtype is {text!r}; allowed: {', '.join(allowed)}")
    return ours


def dtype_to_sage(name: str) -> str:
    """The word of KVDType and DType. Raises ValueError for what they have no word for (fp8_e5m2)."""
    if name not in PROTOCOL_NAMES:
        raise ValueError(
            f"dtype {name!r} has no word in sagellm_protocol; allowed: {', '.join(PROTOCOL_NAMES)}"
        )
    return PROTOCOL_NAMES[name]


def schema_from_request(request: KVTransferRequest) -> KVCacheSchema:
    """The dense cache that a request describes: per layer K and V, each head x token x channel.

    Raises ValueError for an unknown dtype.
    """
    dtype = dtype_from_sage(request.dtype)
    heads, dim = int(request.num_heads), int(request.head_dim)
    plane_bytes = heads * dim * DTYPE_BITS[dtype] // 8
    axes = (("head", heads), ("dim", dim))
    group = GroupSchema(
        kind="full",
        layers=tuple(f"layers.{index}" for index in range(request.num_layers)),
        page_size=_PAGE_TOKENS,
        planes=tuple(PlaneSchema(name, axes, plane_bytes) for name in ("k", "v")),
        canonical=(CanonicalPlaneSchema("k", dim), CanonicalPlaneSchema("v", dim)),
    )
    return KVCacheSchema(
        engine="sagellm",
        model="",
        dtype=dtype,
        total_layers=int(request.num_layers),
        total_kv_heads=heads,
        head_start=0,
        head_count=heads,
        head_dim=dim,
        groups=(group,),
    )


class Ends(NamedTuple):
    """Who moves KV to whom: engine ids and ranks."""

    src_engine_id: str
    dst_engine_id: str
    src_rank: int = 0
    dst_rank: int = 0


def request_from_schema(
    schema: KVCacheSchema, tokens: int, ends: Ends, *, request_id: str, trace_id: str = ""
) -> KVTransferRequest:
    """A request for ``tokens`` tokens of what a rank holds. Raises ValueError where SAGE has no word for it."""
    if schema.dtype not in TORCH_NAMES:
        raise ValueError(f"dtype is {schema.dtype!r}; allowed: {', '.join(TORCH_NAMES)}")
    names = tuple(plane.name for group in schema.groups for plane in group.canonical)
    if len(schema.groups) != 1 or names != ("k", "v"):
        raise ValueError(
            f"groups hold the planes {names}; a KVTransferRequest describes one group of k and v alone"
        )
    return KVTransferRequest(
        request_id=request_id,
        trace_id=trace_id or request_id,
        src_engine_id=ends.src_engine_id,
        dst_engine_id=ends.dst_engine_id,
        src_rank=ends.src_rank,
        dst_rank=ends.dst_rank,
        num_layers=len(schema.groups[0].layers),
        num_tokens=tokens,
        num_heads=schema.head_count,
        head_dim=schema.head_dim,
        dtype=TORCH_NAMES[schema.dtype],
    )


def chunk_from_request(
    request: KVTransferRequest, payload: tuple[Segment, ...], policy: KVQoSPolicy | None = None
) -> KVChunk:
    """The whole of a request's KV as one chunk. Raises ValueError if ``payload`` has another size."""
    nbytes = sum(segment.length for segment in payload)
    expected = int(schema_from_request(request).bytes_per_token() * request.num_tokens)
    if nbytes != expected:
        raise ValueError(f"payload holds {nbytes} bytes; the request describes {expected}")
    return KVChunk(
        str(request.transfer_id),
        payload,
        KVCoordinates(
            layers=(0, request.num_layers), heads=(0, request.num_heads), tokens=(0, request.num_tokens)
        ),
        priority=priority_of(policy) if policy is not None else 0,
    )


def result_from_outcome(request: KVTransferRequest, outcome: Outcome) -> KVTransferResult:
    """How a transfer ended, in SAGE's words; ``duration_ms`` covers waiting and moving."""
    stats = outcome.stats
    return KVTransferResult(
        transfer_id=request.transfer_id,
        request_id=request.request_id,
        state=KVTransferState.DONE if stats else KVTransferState.FAILED,
        bytes_transferred=stats.nbytes if stats else 0,
        duration_ms=(stats.wait_s + stats.transfer_s) * 1e3 if stats else 0.0,
        error=None if stats else outcome.error or "no reason was given",
    )


def outcome_from_result(result: KVTransferResult) -> Outcome:
    """The other way; a result knows neither backend nor mode. Raises ValueError for one that is not over."""
    transfer_id = str(result.transfer_id)
    if result.state is KVTransferState.DONE:
        stats = TransferStats(
            transfer_id, result.bytes_transferred, 0.0, result.duration_ms / 1e3, "", "", False
        )
        return Outcome(transfer_id, stats)
    if result.state is KVTransferState.FAILED:
        code, detail = reason_of_text(result.error or "no reason was given")
        return Outcome(transfer_id, None, Failure(code, FAILURE_KINDS[code].stage, detail))
    raise ValueError(f"state is {result.state.value}; allowed: done, failed")


def transfer_uuid(transfer_id: str) -> uuid.UUID:
    """SAGE's id of one of our transfers: itself if it is a UUID, else always the same for the same text."""
    pattern = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    if re.fullmatch(pattern, transfer_id):
        return uuid.UUID(transfer_id)
    return uuid.uuid5(uuid.NAMESPACE_URL, f"sage-kvt:{transfer_id}")


def priority_of(policy: KVQoSPolicy) -> int:
    """Priority of a chunk, lower first. Raises ValueError for an unknown tier."""
    if policy.tier not in TIERS:
        raise ValueError(f"tier is {policy.tier!r}; allowed: {', '.join(TIERS)}")
    return TIERS[policy.tier]


def plan_from_policy(policy: KVQoSPolicy, config: KVTransportConfig) -> TransferPlan:
    """Deadline of a transfer: ``max_wait_ms``, else the configured one."""
    deadline = config.deadline_s if policy.max_wait_ms is None else policy.max_wait_ms / 1e3
    return TransferPlan(prefetch_depth=config.prefetch_depth, deadline_s=deadline)


def capability_of(device: Device) -> CapabilityDescriptor:
    """What SAGE's scheduler may know of a probed device. Raises ValueError for an unknown vendor."""
    if device.vendor not in DEVICE_TYPES:
        raise ValueError(f"vendor is {device.vendor!r}; allowed: {', '.join(DEVICE_TYPES)}")
    return CapabilityDescriptor(
        device_name=device.name or device.chip,
        device_type=DEVICE_TYPES[device.vendor],
        total_memory_bytes=device.memory_bytes.value if device.memory_bytes else None,
        supported_dtypes=[DType(PROTOCOL_NAMES[name]) for name in MOVED_DTYPES],
        has_stream=True,
        has_event=True,
        has_kv_block_copy=True,
        has_kv_block_migrate=True,
    )


def capabilities_of(profile: HardwareProfile) -> list[CapabilityDescriptor]:
    """One for each device of a machine, in the probe's order. Raises ValueError for an unknown vendor."""
    return [capability_of(device) for device in profile.devices]
