# SPDX-License-Identifier: Apache-2.0
"""sagellm_protocol's types to ours and back."""

from __future__ import annotations

import dataclasses
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("sagellm_protocol")

from sagellm_protocol.backend_types import DType
from sagellm_protocol.kv_hooks import KVDType, KVQoSPolicy
from sagellm_protocol.pd_sep_types import KVTransferRequest, KVTransferResult, KVTransferState

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.chunk import Segment
from sage_kv_connector.contract.failure import Code, Failure, Stage
from sage_kv_connector.contract.plan import Outcome, TransferStats
from sage_kv_connector.hardware.report.run import run_probe
from sage_kv_connector.integrations.sage import mapping
from tests.hardware.recorded import RECORDINGS

requests = st.builds(
    KVTransferRequest,
    request_id=st.text(min_size=1, max_size=20),
    trace_id=st.just("trace"),
    src_engine_id=st.just("prefill"),
    dst_engine_id=st.just("decode"),
    src_rank=st.integers(0, 7),
    dst_rank=st.integers(0, 7),
    num_layers=st.integers(1, 128),
    num_tokens=st.integers(1, 1 << 20),
    num_heads=st.integers(1, 128),
    head_dim=st.integers(1, 64).map(lambda n: 8 * n),
    dtype=st.sampled_from(["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]),
)


@given(requests)
def test_a_request_survives_the_way_there_and_back(request: KVTransferRequest) -> None:
    schema = mapping.schema_from_request(request)
    ends = mapping.Ends(request.src_engine_id, request.dst_engine_id, request.src_rank, request.dst_rank)
    back = mapping.request_from_schema(
        schema, request.num_tokens, ends, request_id=request.request_id, trace_id=request.trace_id
    )
    assert back.model_copy(update={"transfer_id": request.transfer_id}) == request
    assert schema.compare(mapping.schema_from_request(back)).verdict == "identical"
    width = {"float32": 4, "float16": 2, "bfloat16": 2}.get(request.dtype, 1)
    total = 2 * width * request.num_layers * request.num_heads * request.head_dim * request.num_tokens
    chunk = mapping.chunk_from_request(request, (Segment(4096, total),))
    assert chunk.nbytes == total and chunk.transfer_id == str(request.transfer_id)
    assert chunk.coordinates.tokens == (0, request.num_tokens)
    with pytest.raises(ValueError, match=f"payload holds {total + 1} bytes; the request describes {total}"):
        mapping.chunk_from_request(request, (Segment(4096, total + 1),))


@given(requests, st.integers(0, 1 << 40), st.floats(0, 1000), st.floats(0, 1000), st.text(min_size=1))
def test_outcomes(request: KVTransferRequest, nbytes: int, wait: float, took: float, why: str) -> None:
    name = str(request.transfer_id)
    well = Outcome(name, TransferStats(name, nbytes, wait, took, "tcp", "stream", True))
    result = mapping.result_from_outcome(request, well)
    assert (result.state, result.bytes_transferred) == (KVTransferState.DONE, nbytes)
    assert result.duration_ms == pytest.approx((wait + took) * 1e3)
    back = mapping.outcome_from_result(result)
    assert back.stats is not None and back.stats.nbytes == nbytes
    outcome = Outcome(name, None, Failure(Code.EXPIRED, Stage.HOLD, why))
    failed = mapping.result_from_outcome(request, outcome)
    assert failed.state is KVTransferState.FAILED
    assert mapping.outcome_from_result(failed) == outcome


def test_dtypes() -> None:
    assert {mapping.dtype_from_sage(one) for one in KVDType} == {"fp16", "bf16", "fp8_e4m3", "int8"}
    for one in DType:
        assert mapping.dtype_to_sage(mapping.dtype_from_sage(one)) == one.value
    assert mapping.dtype_from_sage("torch.bfloat16") == "bf16"
    with pytest.raises(ValueError, match="dtype is 'fp12'; allowed: float32"):
        mapping.dtype_from_sage("fp12")
    with pytest.raises(ValueError, match="'fp8_e5m2' has no word in sagellm_protocol; allowed: fp32"):
        mapping.dtype_to_sage("fp8_e5m2")


def test_quality_of_service() -> None:
    config = KVTransportConfig(prefetch_depth=3, deadline_s=50)
    assert mapping.plan_from_policy(KVQoSPolicy(max_wait_ms=250), config).deadline_s == 0.25
    assert mapping.plan_from_policy(KVQoSPolicy(), config).deadline_s == 50
    ranks = [mapping.priority_of(KVQoSPolicy(tier=tier)) for tier in ("critical", "high", "default", "low")]
    assert ranks == sorted(set(ranks))
    with pytest.raises(ValueError, match="tier is 'gold'; allowed: critical"):
        mapping.priority_of(KVQoSPolicy(tier="gold"))


def test_ids_and_states() -> None:
    known = uuid.uuid4()
    assert mapping.transfer_uuid(str(known)) == known
    assert mapping.transfer_uuid("abc") == mapping.transfer_uuid("abc") != mapping.transfer_uuid("abd")
    pending = KVTransferResult(transfer_id=known, request_id="r", state=KVTransferState.IN_PROGRESS)
    with pytest.raises(ValueError, match="state is in_progress; allowed: done, failed"):
        mapping.outcome_from_result(pending)


def test_what_sage_can_not_say_is_refused() -> None:
    request = KVTransferRequest(
        request_id="r", trace_id="t", src_engine_id="a", dst_engine_id="b", src_rank=0, dst_rank=1,
        num_layers=1, num_tokens=1, num_heads=1, head_dim=8,
    )  # fmt: skip
    schema = mapping.schema_from_request(request)
    import msgspec

    two = msgspec.structs.replace(schema, groups=schema.groups * 2)
    with pytest.raises(ValueError, match="describes one group of k and v alone"):
        mapping.request_from_schema(two, 1, mapping.Ends("a", "b"), request_id="r")


@pytest.mark.parametrize(
    ("machine", "kind"),
    [("ascend_a2", "ascend"), ("cambricon", "mlu"), ("hygon", "dcu"), ("kunlunxin", "xpu")],
)
def test_probed_devices_become_capabilities(machine: str, kind: str) -> None:
    profile = run_probe(from_recording=RECORDINGS / machine)
    found = mapping.capabilities_of(profile)
    assert len(found) == len(profile.devices) > 0
    assert {one.device_type for one in found} == {kind} and all(one.has_kv_block_copy for one in found)
    assert dataclasses.asdict(found[0])["device_name"]
