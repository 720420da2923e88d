# SPDX-License-Identifier: Apache-2.0
"""Bodies of a store's questions decode exactly or are refused."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_kv_connector.store import messages as sm

texts = st.text(min_size=1, max_size=40)
flags = st.lists(st.booleans()).map(tuple)
items = st.dictionaries(texts, st.integers(1, sm.MAX_ITEM_BYTES), min_size=1, max_size=9).map(
    lambda d: (tuple(d), tuple(d.values()))
)
valid = st.one_of(
    st.builds(sm.Where, texts, texts, st.lists(texts).map(tuple)),
    st.builds(lambda t, i, ms: sm.Put(t, i[0], i[1], ms), texts, items, st.integers(1, 1 << 40)),
    items.map(lambda i: sm.Get(i[0], i[1])),
    st.builds(sm.Offered, texts, flags),
    items.map(lambda i: sm.Held(i[0])),
    st.builds(sm.Flags, flags),
    st.builds(sm.Clear, texts),
    st.builds(sm.Cleared, st.integers(0, 1 << 40)),
    st.just(sm.Empty()),
)


@given(valid)
def test_every_body_survives_the_wire(body: msgspec.Struct) -> None:
    assert sm.decode(sm.encode(body), type(body)) == body


@given(valid, st.data())
def test_changed_bytes_never_escape_the_bounds(body: msgspec.Struct, data: st.DataObject) -> None:
    raw = bytearray(sm.encode(body))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        decoded = sm.decode(bytes(raw), type(body))
    except sm.BodyError:
        return
    if isinstance(decoded, sm.Put | sm.Get):
        assert 0 < len(decoded.keys) == len(decoded.sizes) <= sm.MAX_KEYS
        assert all(0 < len(key) <= sm.MAX_KEY for key in decoded.keys) and min(decoded.sizes) > 0


@given(st.binary(max_size=200), st.sampled_from([sm.Put, sm.Get, sm.Held, sm.Flags, sm.Offered, sm.Stats]))
def test_noise_is_refused_not_raised_as_anything_else(noise: bytes, kind: type[msgspec.Struct]) -> None:
    try:
        sm.decode(noise, kind)
    except sm.BodyError:
        pass


def test_a_body_of_arrays_in_arrays_is_refused() -> None:
    with pytest.raises(sm.BodyError, match="Get of 60008 bytes is not valid"):
        sm.decode(b"\x93\x91\xa1a\x91\x01" + b"\x91" * 60_002, sm.Get)
