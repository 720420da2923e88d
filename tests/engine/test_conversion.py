# SPDX-License-Identifier: Apache-2.0
"""Any prefill to any decode: what lands equals the reference, whatever differs between the two sides."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from sage_kv_connector.engine.conversion.wire_plan import plan_wire
from sage_kv_connector.engine.core import EngineCore
from sage_kv_connector.engine.session.agreement import SchemaVerdict
from sage_kv_connector.format.reference import RAW, decode_tile, encode_tile, from_float, to_float
from sage_kv_connector.format.wire_format import WireFormat, tile_tokens
from tests.engine.converting_side import DIM, TOTAL_LAYERS, ConvertingSide, Shape
from tests.engine.paged_side import eventually

MakeCore = Callable[..., EngineCore]
TOKENS = 150
Content = dict[tuple[int, int, int], npt.NDArray[np.generic]]


def pages_for(side: ConvertingSide, seed: int) -> list[int]:
    count = -(-TOKENS // side.shape.page_size)
    return [int(p) for p in np.random.default_rng(seed).permutation(len(side.cache[0]))[:count]]


def write_content(side: ConvertingSide, pages: list[int], tokens: range) -> Content:
    """Random elements of every head and layer that this side holds: (layer, plane, head) → raw bits."""
    content: Content = {}
    for layer in range(*side.shape.layers):
        for plane in (0, 1):
            for head in range(*side.shape.heads):
                rng = np.random.default_rng([layer, plane, head])
                values = rng.normal(size=(len(tokens), DIM)).astype(np.float32)
                raw = from_float(values, side.shape.dtype)
                content[layer, plane, head] = raw
                side.fill(layer, plane, head, tokens, pages, raw)
    return content


def expected_of(
    raw: npt.NDArray[np.generic], source: Shape, target: Shape, fmt: WireFormat, plane: int, first: int
) -> npt.NDArray[np.generic]:
    """What the reference makes of one head's tokens from ``first`` on."""
    source_scale = source.scales[plane] if source.dtype.startswith("fp8") else 1.0
    target_scale = target.scales[plane] if target.dtype.startswith("fp8") else 1.0
    wire_scale = 1.0
    if fmt.granularity == "tensor":
        wire_scale = target_scale if target.dtype == fmt.dtype and source.dtype != fmt.dtype else source_scale
    values = to_float(raw, source.dtype) * np.float32(source_scale)
    rows = []
    at = 0
    for count in tile_tokens(first, len(raw), fmt.group_tokens):
        tile = encode_tile(values[at : at + count], fmt, wire_scale)
        if source.dtype == fmt.dtype and wire_scale == source_scale:  # the bits themselves
            codes = np.ascontiguousarray(raw[at : at + count]).reshape(-1).view(np.uint8)
            tile[: len(codes)] = codes
        if target.dtype == fmt.dtype and wire_scale == target_scale and fmt.granularity in ("none", "tensor"):
            rows.append(tile.view(RAW[fmt.dtype])[: count * DIM].reshape(count, DIM))
        else:
            decoded = decode_tile(tile, fmt, count, DIM, wire_scale)
            scaled = decoded * (np.float32(1) / np.float32(target_scale))
            rows.append(from_float(scaled, target.dtype))
        at += count
    return np.concatenate(rows)


def check(
    source: ConvertingSide,
    target: ConvertingSide,
    content: Content,
    pages: list[int],
    tokens: range,
    wire: str,
) -> None:
    plan = plan_wire(target.schema, source.schema, wire)
    checked = 0
    for (layer, plane, head), raw in content.items():
        if head not in range(*target.shape.heads) or layer not in range(*target.shape.layers):
            continue
        wanted = expected_of(
            raw[tokens.start :], source.shape, target.shape, plan.formats[0][plane], plane, tokens.start
        )
        np.testing.assert_array_equal(target.elements(layer, plane, head, tokens, pages), wanted)
        checked += 1
    assert checked


HALVES = ((0, 2), (2, 4))
SCALED = (0.25, 0.3)


@pytest.mark.parametrize(
    ("source", "target", "wire"),
    [
        (Shape(page_size=16), Shape(page_size=8), "auto"),
        (Shape(page_size=8), Shape(page_size=16), "auto"),
        (Shape(page_size=12), Shape(page_size=16), "auto"),
        (Shape(page_size=16, packing="cpu-vec"), Shape(page_size=32, packing="cpu-amx"), "auto"),
        (Shape(order="nhd"), Shape(order="hnd"), "auto"),
        (Shape(), Shape(dtype="fp8_e4m3", scales=SCALED), "auto"),
        (Shape(dtype="fp8_e4m3", scales=SCALED), Shape(), "auto"),
        (Shape(dtype="fp8_e4m3", scales=SCALED), Shape(dtype="fp8_e4m3"), "auto"),
        (Shape(dtype="fp8_e4m3", scales=SCALED), Shape(dtype="fp8_e5m2"), "auto"),
        (Shape(dtype="fp16"), Shape(), "auto"),
        (Shape(dtype="fp32"), Shape(dtype="fp16"), "auto"),
        (Shape(), Shape(), "fp8_e4m3"),
        (Shape(), Shape(), "fp8_e5m2"),
        (Shape(), Shape(), "int4"),
        (Shape(page_size=12), Shape(page_size=16, packing="cpu-amx", dtype="fp32"), "int4"),
        (Shape(), Shape(dtype="fp8_e4m3", scales=SCALED), "fp32"),
    ],
)
def test_what_lands_equals_the_reference(
    make_native_core: MakeCore, source: Shape, target: Shape, wire: str
) -> None:
    prefill = ConvertingSide(make_native_core, source, 24)
    decode = ConvertingSide(make_native_core, target, 24, target_dtype=wire)
    there, here = pages_for(prefill, 1), pages_for(decode, 2)
    content = write_content(prefill, there, range(TOKENS))
    offer = prefill.offer("t", there)
    prefill.ready("t", offer, slice(None), len(there))
    prefill.core.finish("t")
    tokens = range(2 * target.page_size, TOKENS)
    decode.subscribe(prefill, "t", tokens, here, finished=True)
    outcome = decode.outcomes.get(timeout=10)
    assert outcome.ok, outcome.error
    assert prefill.released.get(timeout=5).ok
    check(prefill, decode, content, here, tokens, wire)
    assert outcome.stats is not None and outcome.stats.wire_dtype != "same"
    for core in (prefill.core, decode.core):
        counters = core.counters()
        assert (counters["staging_bytes"], counters["conversions"], counters["offers"]) == (0, 0, 0)


def test_heads_of_one_prefill_are_split_over_two_decode_ranks(make_native_core: MakeCore) -> None:
    prefill = ConvertingSide(make_native_core, Shape(), 24)
    there = pages_for(prefill, 1)
    content = write_content(prefill, there, range(TOKENS))
    ranks = [ConvertingSide(make_native_core, Shape(heads=half), 24) for half in HALVES]
    offer = prefill.offer("t", there)
    for seed, rank in enumerate(ranks):
        rank.subscribe(prefill, "t", range(TOKENS), pages_for(rank, seed), consumers=2)
    prefill.ready("t", offer, slice(None), len(there))
    prefill.core.finish("t")
    for seed, rank in enumerate(ranks):
        outcome = rank.outcomes.get(timeout=10)
        assert outcome.ok, outcome.error
        check(prefill, rank, content, pages_for(rank, seed), range(TOKENS), "auto")
    assert prefill.released.get(timeout=5).ok


def test_a_prefill_is_held_until_the_second_decode_rank_came(make_native_core: MakeCore) -> None:
    prefill = ConvertingSide(make_native_core, Shape(), 24)
    there = pages_for(prefill, 1)
    offer = prefill.offer("t", there)
    prefill.ready("t", offer, slice(None), len(there))
    prefill.core.finish("t")
    ranks = [ConvertingSide(make_native_core, Shape(heads=half), 24) for half in HALVES]
    ranks[0].subscribe(prefill, "t", range(TOKENS), pages_for(ranks[0], 0), consumers=2)
    assert ranks[0].outcomes.get(timeout=10).ok
    with pytest.raises(queue.Empty):
        prefill.released.get(timeout=0.3)
    ranks[1].core.release(prefill.address(), "t", 2)
    assert prefill.released.get(timeout=5).ok


def test_a_prefill_whose_second_decode_rank_never_comes_is_held_for_one_lease(
    make_native_core: MakeCore,
) -> None:
    prefill = ConvertingSide(make_native_core, Shape(), 24, lease_s=1)
    there = pages_for(prefill, 1)
    offer = prefill.offer("t", there)
    prefill.ready("t", offer, slice(None), len(there))
    prefill.core.finish("t")
    rank = ConvertingSide(make_native_core, Shape(heads=HALVES[0]), 24)
    rank.subscribe(prefill, "t", range(TOKENS), pages_for(rank, 0), consumers=2)
    assert rank.outcomes.get(timeout=10).ok
    assert prefill.released.get(timeout=5).ok  # what the first one got counts


@pytest.mark.parametrize("axis", ["heads", "layers"])
def test_two_prefill_ranks_are_merged_in_one_decode(make_native_core: MakeCore, axis: str) -> None:
    """Tensor parallel ranks hold heads, pipeline parallel ranks hold layers."""
    ranks = [ConvertingSide(make_native_core, Shape()._replace(**{axis: half}), 24) for half in HALVES]  # type: ignore[arg-type]
    decode = ConvertingSide(make_native_core, Shape(page_size=8), 24)
    here = pages_for(decode, 7)
    for seed, rank in enumerate(ranks):
        there = pages_for(rank, seed)
        content = write_content(rank, there, range(TOKENS))
        offer = rank.offer("t", there)
        rank.ready("t", offer, slice(None), len(there))
        rank.core.finish("t")
        decode.subscribe(rank, "t", range(TOKENS), here, finished=True)
        outcome = decode.outcomes.get(timeout=10)
        assert outcome.ok, outcome.error
        check(rank, decode, content, here, range(TOKENS), "auto")
        assert rank.released.get(timeout=5).ok


def test_parts_stream_while_prefill_computes(make_native_core: MakeCore) -> None:
    prefill = ConvertingSide(make_native_core, Shape(page_size=8), 1200)
    decode = ConvertingSide(make_native_core, Shape(), 600)
    tokens = range(5000)
    there = list(range(625))
    offer = prefill.offer("t", there)
    decode.subscribe(prefill, "t", tokens, list(range(400)))
    eventually(lambda: prefill.core.is_streaming("t"))
    converted: list[int] = []
    for pages in (256, 512):
        prefill.ready("t", offer, slice(0, 2), pages)
        prefill.ready("t", offer, slice(2, TOTAL_LAYERS), pages)
        eventually(lambda: decode.core.counters()["decoded_wire_bytes"] > sum(converted))
        converted.append(decode.core.counters()["decoded_wire_bytes"] - sum(converted))
    prefill.ready("t", offer, slice(None), 625)
    prefill.core.finish("t")
    assert decode.outcomes.get(timeout=10).ok
    assert prefill.released.get(timeout=5).ok


def test_who_waits_for_a_prefill_keeps_nobody_from_staging_memory(make_native_core: MakeCore) -> None:
    """Else those whose prefill is over wait for it, and keep the pages that the others' prefills wait for."""
    prefill = ConvertingSide(make_native_core, Shape(page_size=8), 1200)
    decode = ConvertingSide(make_native_core, Shape(), 600)
    there, here = list(range(625)), list(range(313))
    waiting = prefill.offer("waits", there)
    decode.subscribe(prefill, "waits", range(5000), here)
    eventually(lambda: prefill.core.is_streaming("waits"))
    time.sleep(0.05)
    assert [side.core.counters()["staging_bytes"] for side in (prefill, decode)] == [0, 0]
    prefill.ready("waits", waiting, slice(None), 256)
    eventually(lambda: all(side.core.counters()["staging_bytes"] > 0 for side in (prefill, decode)))
    quarter = prefill.core.config.staging_bytes // 4
    assert all(side.core.counters()["staging_bytes"] <= quarter for side in (prefill, decode))
    prefill.ready("waits", waiting, slice(None), 625)
    prefill.core.finish("waits")
    assert decode.outcomes.get(timeout=10).ok
    assert prefill.released.get(timeout=5).ok


def test_more_transfers_than_rings_take_turns(make_native_core: MakeCore) -> None:
    prefill = ConvertingSide(make_native_core, Shape(page_size=8), 1200, staging_bytes=16 << 20)
    decode = ConvertingSide(make_native_core, Shape(), 1200, staging_bytes=16 << 20)
    there = list(range(1024))
    content = write_content(prefill, there[:10], range(80))
    for number in range(12):
        offer = prefill.offer(f"t{number}", there)
        prefill.ready(f"t{number}", offer, slice(None), len(there))
        prefill.core.finish(f"t{number}")
        decode.subscribe(prefill, f"t{number}", range(8192), list(range(512)), finished=number % 2 == 0)
    for _ in range(12):
        outcome = decode.outcomes.get(timeout=20)
        assert outcome.ok, outcome.error
        assert prefill.released.get(timeout=5).ok
    check(prefill, decode, content, list(range(512)), range(80), "auto")
    for side in (prefill, decode):
        eventually(lambda side=side: side.core.counters()["staging_bytes"] == 0)  # type: ignore[misc]


def test_a_cancel_between_parts_frees_both_sides(make_native_core: MakeCore) -> None:
    prefill, decode = (
        ConvertingSide(make_native_core, Shape(page_size=8), 40),
        ConvertingSide(make_native_core, Shape(), 24),
    )
    there = pages_for(prefill, 1)
    offer = prefill.offer("t", there)
    handles = decode.subscribe(prefill, "t", range(TOKENS), pages_for(decode, 2))
    eventually(lambda: prefill.core.is_streaming("t"))
    (handle,) = handles
    prefill.ready("t", offer, slice(None), 4)
    decode.core.cancel(handle)
    assert decode.outcomes.get(timeout=5).aborted
    prefill.core.finish("t")
    assert not prefill.released.get(timeout=5).ok
    for core in (prefill.core, decode.core):
        counters = core.counters()
        assert (counters["staging_bytes"], counters["conversions"], counters["subscriptions"]) == (0, 0, 0)


def test_a_withdrawn_prefill_and_a_lost_session_end_the_transfer(make_native_core: MakeCore) -> None:
    for end in ("withdraw", "close"):
        prefill = ConvertingSide(make_native_core, Shape(page_size=8), 40)
        decode = ConvertingSide(make_native_core, Shape(), 24)
        prefill.offer("t", pages_for(prefill, 1))
        decode.subscribe(prefill, "t", range(TOKENS), pages_for(decode, 2))
        eventually(lambda p=prefill: p.core.is_streaming("t"))  # type: ignore[misc]
        if end == "withdraw":
            prefill.core.withdraw(["t"], "prefill was aborted")
        else:
            prefill.core.close()
        assert not decode.outcomes.get(timeout=5).ok
        assert decode.core.counters()["staging_bytes"] == 0


def test_pages_of_another_order_never_go_as_they_are(make_native_core: MakeCore) -> None:
    """Neither side relies on the other: the consumer refuses, and so does the producer if it is asked."""
    prefill = ConvertingSide(make_native_core, Shape(packing="cpu-vec"), 24)
    decode = ConvertingSide(make_native_core, Shape(packing="cpu-amx"), 24)
    there, here = pages_for(prefill, 1), pages_for(decode, 2)
    for transfer_id in ("asked", "posted"):
        offer = prefill.offer(transfer_id, there)
        prefill.ready(transfer_id, offer, slice(None), len(there))
        prefill.core.finish(transfer_id)
        if transfer_id == "posted":
            decode.core.sessions.get(
                prefill.address(), lambda session: setattr(session, "verdict", SchemaVerdict())
            )
        decode.subscribe(prefill, transfer_id, range(TOKENS), here, finished=True, by_tokens=False)
        outcome = decode.outcomes.get(timeout=5)
        assert "pages can't go as they are" in outcome.error and "packing" in outcome.error
        assert ("told by the peer" in outcome.error) == (transfer_id == "posted")


def test_a_page_that_is_not_there_ends_the_transfer_and_keeps_no_staging_memory(
    make_native_core: MakeCore,
) -> None:
    prefill, decode = (
        ConvertingSide(make_native_core, Shape(page_size=8), 40),
        ConvertingSide(make_native_core, Shape(), 24),
    )
    there = [99, *pages_for(prefill, 1)[1:]]
    offer = prefill.offer("t", there)
    prefill.ready("t", offer, slice(None), len(there))
    prefill.core.finish("t")
    decode.subscribe(prefill, "t", range(TOKENS), pages_for(decode, 2), finished=True)
    assert "page is 99, allowed: 0 to 39" in decode.outcomes.get(timeout=5).error
    assert not prefill.released.get(timeout=5).ok
    for core in (prefill.core, decode.core):
        assert core.counters()["staging_bytes"] == 0


def test_what_does_not_fit_is_refused_by_name(make_native_core: MakeCore) -> None:
    prefill = ConvertingSide(make_native_core, Shape(), 24)
    there = pages_for(prefill, 1)
    for change, message in (
        (Shape(heads=(0, 2), total_heads=2), "total_kv_heads: 2 here, 4 at the peer"),
        (Shape(dtype="bf16", packing="cpu-amx"), ""),
    ):
        decode = ConvertingSide(make_native_core, change, 24)
        offer = prefill.offer(f"t{message}", there)
        prefill.ready(f"t{message}", offer, slice(None), len(there))
        prefill.core.finish(f"t{message}")
        decode.subscribe(prefill, f"t{message}", range(TOKENS), pages_for(decode, 2), finished=True)
        outcome = decode.outcomes.get(timeout=5)
        assert message in outcome.error and outcome.ok == (not message)
        prefill.released.get(timeout=5)
    decode = ConvertingSide(make_native_core, Shape(page_size=8), 40)
    prefill.offer("late", there[:2])
    prefill.core.finish("late")
    decode.subscribe(prefill, "late", range(TOKENS), pages_for(decode, 2), deadline_s=0.5)
    error = decode.outcomes.get(timeout=5).error
    assert "the deadline" in error or "time is over" in error
