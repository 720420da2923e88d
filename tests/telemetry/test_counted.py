# SPDX-License-Identifier: Apache-2.0
"""What engines count while KV moves, over each backend: bytes, codes, stages that fill the whole time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from sage_kv_connector.contract.prompt import Prompt
from sage_kv_connector.engine.transfer.offer import OfferTerms
from sage_kv_connector.telemetry.recording.snapshot import Snapshot, TransferRecord
from tests.engine.conftest import Cores, made_cores
from tests.engine.converting_side import ConvertingSide, Shape
from tests.engine.paged_side import Side, assert_pages_equal, eventually


@pytest.fixture(params=["shm", "tcp"])
def make(request: pytest.FixtureRequest) -> Iterator[Cores]:
    yield from made_cores(backend=request.param, host="127.0.0.1")


def only(snapshot: Snapshot) -> TransferRecord:
    (record,) = snapshot.transfers
    return record


def handed_over(make: Cores, terms: OfferTerms | None = None) -> tuple[Side, Side]:
    prefill, decode = Side(make(), 1), Side(make(), 2)
    prefill.prefilled("t", [1, 2, 3], terms or OfferTerms())
    decode.subscribe(prefill, "t", range(3), [4, 5, 6])
    assert decode.outcomes.get(timeout=10).ok and prefill.released.get(timeout=10).ok
    assert_pages_equal(prefill, [1, 2, 3], decode, [4, 5, 6])
    return prefill, decode


def test_both_sides_count_the_bytes_that_moved(make: Cores) -> None:
    prefill, decode = handed_over(make)
    nbytes = sum(cache[[1, 2, 3]].nbytes for cache in prefill.cache)
    backend = next(iter(prefill.core.backends))
    out, came = prefill.core.snapshot(), decode.core.snapshot()
    assert out.value("link_bytes_total", direction="sent", peer=f"{decode.core.engine_id}[0]") == nbytes
    assert came.value("link_bytes_total", direction="landed", backend=backend) == nbytes
    assert out.value("transferred_bytes_total", side="prefill", wire_dtype="same") == nbytes
    assert came.value("transferred_bytes_total", side="decode", backend=backend) == nbytes
    assert came.value("kv_bytes_total") == nbytes
    assert came.value("transfers_total", code="ok") == out.value("transfers_total", code="ok") == 1
    assert out.value("chunks_total", direction="sent") == came.value("chunks_total", direction="landed") >= 1
    (link,) = came.links
    assert link.landed == nbytes and link.backend == backend and link.capacity > 0


@pytest.mark.parametrize("wire", ["same", "fp8_e4m3"])
def test_stages_fill_the_whole_time_of_a_transfer(make: Cores, wire: str) -> None:
    shape = Shape()
    options = {} if wire == "same" else {"target_dtype": wire}
    prefill, decode = ConvertingSide(make, shape, 8, **options), ConvertingSide(make, shape, 8, **options)
    offer = prefill.offer("t", [1, 2])
    prefill.ready("t", offer, slice(None), 2)
    prefill.core.finish("t")
    decode.subscribe(prefill, "t", range(32), [3, 4])
    assert decode.outcomes.get(timeout=10).ok and prefill.released.get(timeout=10).ok
    came, out = only(decode.core.snapshot()), only(prefill.core.snapshot())
    for record in (came, out):
        assert sum(seconds for _, seconds in record.stages) == pytest.approx(record.seconds, rel=0.05)
        assert all(seconds >= 0 for _, seconds in record.stages)
    expected = ["connect", "wait", "wire", *(["decode"] if wire != "same" else []), "report"]
    assert [name for name, _ in came.stages] == expected
    assert [name for name, _ in out.stages] == ["wait", "queue", "wire", "report"]
    assert came.wire_dtype == out.wire_dtype == wire
    if wire != "same":
        assert came.nbytes < 0.6 * came.kv_bytes
        taken = prefill.core.snapshot()
        assert taken.value("conversion_seconds_total", work="encode") > 0
        assert taken.value("conversion_seconds_total", work="decode") == 0
        assert taken.value("converted_bytes_total", work="encode") == came.nbytes


def test_a_stage_that_waits_for_prefill_is_called_so(make: Cores) -> None:
    prefill, decode = Side(make(), 1), Side(make(), 2)
    source = prefill.offer("t", [1, 2])
    decode.subscribe(prefill, "t", range(2), [4, 5])
    eventually(lambda: prefill.core.is_streaming("t"))
    eventually(lambda: decode.core.counters()["sessions"] == 1)
    for layer in range(3):
        prefill.ready("t", source, slice(layer, layer + 1), 2)
    prefill.core.finish("t")
    assert decode.outcomes.get(timeout=10).ok and prefill.released.get(timeout=10).ok
    came = dict(only(decode.core.snapshot()).stages)
    assert came["wait"] > 0 and came["connect"] > 0


def test_a_failure_is_counted_by_its_code_on_the_side_that_it_is_of(make: Cores) -> None:
    prefill, decode = Side(make({"lease_s": 0.05}), 1), Side(make(), 2)
    prefill.prefilled("nobody", [1])
    assert not prefill.released.get(timeout=10).ok
    decode.subscribe(prefill, "nobody", range(1), [4], finished=True, deadline_s=0.2)
    outcome = decode.outcomes.get(timeout=10)
    assert outcome.failure is not None
    assert prefill.core.snapshot().value("transfers_total", code="expired", side="prefill") == 1
    came = decode.core.snapshot()
    assert came.value("transfers_total", code=str(outcome.failure.code), side="decode") == 1
    assert came.value("lost_seconds_total", code=str(outcome.failure.code)) > 0
    assert came.value("transferred_bytes_total") == 0


def test_bytes_of_a_session_that_ended_still_count(make: Cores) -> None:
    prefill, decode = handed_over(make)
    nbytes = sum(cache[[1, 2, 3]].nbytes for cache in prefill.cache)
    decode.core.close()  # nobody read how much it was before
    eventually(lambda: not prefill.core.counters()["sessions"])
    assert prefill.core.snapshot().value("link_bytes_total", direction="sent") == nbytes
    prefill.core.snapshot()
    assert prefill.core.snapshot().value("link_bytes_total") == nbytes


def test_small_posts_and_lanes_are_timed_unless_telemetry_is_off(make: Cores) -> None:
    prefill, decode = handed_over(make)
    (times,) = [one for one in prefill.core.snapshot().times if one.metric == "small_post_seconds"]
    assert sum(times.counts) == 1 and 0 < sum(times.seconds) < 10
    assert decode.core.snapshot().value("lane_seconds_total", work="place") > 0
    prefill, decode = Side(make({"telemetry": False}), 1), Side(make({"telemetry": False}), 2)
    prefill.prefilled("t", [1])
    decode.subscribe(prefill, "t", range(1), [4])
    assert decode.outcomes.get(timeout=10).ok
    eventually(lambda: not prefill.core.counters()["posts"])
    for side in (prefill, decode):
        assert not [one for one in side.core.snapshot().times if one.metric == "small_post_seconds"]
        assert side.core.snapshot().value("lane_seconds_total") == 0


def test_the_hottest_chunk_is_the_one_that_prompts_begin_with(make: Cores) -> None:
    prompt = Prompt(np.arange(300).tolist())
    prefill, _ = handed_over(make, OfferTerms(prompt=prompt))
    (hot,) = prefill.core.snapshot().hot_chunks
    assert (hot.tokens, hot.handovers) == (256, 1)
    assert hot.digest == prompt.chunks(256, 1)[0].digest.hex()
