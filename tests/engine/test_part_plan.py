# SPDX-License-Identifier: Apache-2.0
"""Parts cover what is wanted exactly once, are small enough, and are the same on both sides."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_kv_connector.engine.conversion import part_plan
from sage_kv_connector.engine.conversion.part_plan import Wanted, plan_parts
from sage_kv_connector.engine.conversion.staging import (
    RING_SLOTS,
    RINGS_IN_ARENA,
    STREAMING_SLOTS,
    StagingArena,
    part_bytes_of,
    ring_of,
)
from sage_kv_connector.format.wire_format import WireFormat

FORMATS = (
    WireFormat("bf16"),
    WireFormat("fp8_e4m3", "token"),
    WireFormat("int4", "channel", zero_point=True),
)


@st.composite
def groups(draw: st.DrawFn) -> list[Wanted]:
    found = []
    for group in sorted(draw(st.sets(st.integers(0, 5), min_size=1, max_size=3))):
        runs, at = [], 0
        for _ in range(draw(st.integers(1, 3))):
            at += draw(st.integers(0, 3))
            count = draw(st.integers(1, 6))
            runs.append((at, count))
            at += count
        if draw(st.booleans()) and draw(st.booleans()):  # pages that go whole
            size, page = draw(st.sampled_from([1, 528, 1 << 17])), draw(st.integers(0, 3))
            tokens = range(size * page, size * (page + draw(st.integers(1, 40))))
            found.append(Wanted(group, runs, tokens, (), (), size, draw(st.integers(1, 1 << 20))))
            continue
        first = draw(st.integers(0, 9000))
        tokens = range(first, first + draw(st.integers(1, 6000)))
        planes = draw(st.integers(1, 2))
        formats = tuple(draw(st.sampled_from(FORMATS)) for _ in range(planes))
        found.append(Wanted(group, runs, tokens, formats, [16] * planes))
    return found


@given(groups(), st.integers(1, 8), st.sampled_from([1, 4096, 256 << 10, 4 << 20]))
def test_parts_cover_everything_once(wanted: list[Wanted], heads: int, part_bytes: int) -> None:
    parts = plan_parts(wanted, heads, part_bytes)
    of = {one.group: one for one in wanted}
    seen: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for group, first_layer, layers, first, tokens, nbytes in parts.tolist():
        one = of[group]
        if not one.formats:
            assert nbytes * one.page_tokens == layers * tokens * one.page_bytes
            assert nbytes <= part_bytes or (layers, tokens) == (1, one.page_tokens)
            for layer in range(first_layer, first_layer + layers):
                seen.setdefault((group, layer), []).append((first, tokens))
            continue
        each = sum(fmt.span_bytes(first, tokens, dim) for fmt, dim in zip(one.formats, one.dims, strict=True))
        assert nbytes == layers * heads * each
        tile = max(fmt.group_tokens for other in wanted for fmt in other.formats)
        assert nbytes <= part_bytes or (layers == 1 and tokens <= tile)
        for layer in range(first_layer, first_layer + layers):
            seen.setdefault((group, layer), []).append((first, tokens))
    for one in wanted:
        for run, count in one.runs:
            for layer in range(run, run + count):
                at = one.tokens.start
                for first, tokens in sorted(seen.pop((one.group, layer))):
                    assert first == at
                    at += tokens
                assert at == one.tokens.stop
    assert not seen
    # Tokens ascend, as prefill computes them, but for groups that begin within a chunk. Whole pages come last.
    whole = np.array([not of[group].formats for group in parts[:, 0].tolist()])
    assert (np.diff(parts[~whole, 3] // 2048) >= 0).all() and (np.diff(whole.astype(int)) >= 0).all()


@given(groups(), st.integers(1, 8), st.integers(1, 50))
def test_both_sides_cut_alike_whatever_their_layers_numbers(
    wanted: list[Wanted], heads: int, shift: int
) -> None:
    theirs = [one._replace(runs=[(run + shift, count) for run, count in one.runs]) for one in wanted]
    ours, peers = plan_parts(wanted, heads, 64 << 10), plan_parts(theirs, heads, 64 << 10)
    np.testing.assert_array_equal(np.delete(ours, 1, axis=1), np.delete(peers, 1, axis=1))
    np.testing.assert_array_equal(ours[:, 1] + shift, peers[:, 1])


@pytest.mark.parametrize("tokens", [range(1 << 32), range(1 << 40, (1 << 40) + 10)])
def test_what_a_peer_asks_for_costs_no_more_than_it_may(tokens: range) -> None:
    near = Wanted(0, [(0, 1)], range(10), FORMATS[:1], [16])
    far = Wanted(1, [(0, 80)], tokens, FORMATS[:1], [16])
    begun = time.monotonic()
    with pytest.raises(ValueError, match="are more than 262144 parts"):
        plan_parts([near, far], 1, 1 << 20)
    whole = Wanted(1, [(0, 80)], tokens, (), (), 1, 1 << 20)
    for wanted in ([near, whole], [whole, whole._replace(group=2)]) if len(tokens) > 10 else ():
        with pytest.raises(ValueError, match="parts that are left"):
            plan_parts(wanted, 1, 1 << 20)
    assert time.monotonic() - begun < 1


def test_many_ranges_that_are_alike_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counted(formats: object, dims: object, first: int, tokens: int) -> int:
        asked.append((first, tokens))
        return 2 * tokens

    monkeypatch.setattr(part_plan, "head_bytes", counted)
    parts = plan_parts([Wanted(0, [(0, 1)], range(3, 64 * 200_000), FORMATS[:1], [16])], 1, 128)
    assert len(parts) == 200_000 and len(asked) < 20


@given(st.integers(16, 256), st.integers(1, 40 << 20), st.integers(1, 1000), st.booleans())
def test_a_ring_leaves_room_for_others_where_it_can(mib: int, part: int, parts: int, finished: bool) -> None:
    arena = StagingArena(mib << 20, lambda *_: None)
    ring = ring_of(arena, part, parts, finished=finished)
    assert ring.slot_bytes >= part and 1 <= ring.slots <= parts
    assert ring.slots == 1 or ring.nbytes <= arena.capacity // RINGS_IN_ARENA
    slots = ring_of(arena, part_bytes_of(arena), parts, finished=finished).slots
    assert slots == min(parts, RING_SLOTS if finished else STREAMING_SLOTS)


@given(groups(), st.integers(1, 300))
def test_more_parts_than_allowed_are_refused_before_there_are_any(wanted: list[Wanted], most: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(part_plan, "MAX_PARTS", most)
        try:
            # So large that a chunk of a layer is one part.
            parts = plan_parts(wanted, 1, 64 << 20)
        except ValueError as error:
            # Whole pages come after what was planned before them.
            found = re.search(r"are more than (?:the )?(\d+) parts", str(error))
            assert found is not None and 0 <= int(found[1]) <= most
        else:
            assert len(parts) <= most
