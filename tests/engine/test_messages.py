# SPDX-License-Identifier: Apache-2.0
"""Nothing a peer sends is trusted: messages decode exactly or are refused."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_kv_connector.contract.prompt import PromptDigest
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.session.transfer_messages import MAX_AGAIN_MS, MAX_TIMEOUT_MS
from sage_kv_connector.format.wire_format import WireFormat

names = st.text(min_size=1, max_size=40)
u63 = st.integers(1, 2**63 - 1)


@st.composite
def page_runs(draw: st.DrawFn) -> tuple[m.PageRuns, ...]:
    parts = []
    for group in draw(st.lists(st.integers(0, 5), unique=True, max_size=3)):
        end, runs = 0, []
        for gap, count in draw(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=4)):
            runs.append((end + gap, count))
            end += gap + count
        parts.append(m.PageRuns(group, tuple(runs)))
    return tuple(parts)


@st.composite
def part_groups(draw: st.DrawFn) -> tuple[m.PartGroup, ...]:
    runs = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=3).map(tuple)
    known = [WireFormat("bf16"), WireFormat("fp8_e4m3", "token")]
    formats = st.lists(st.sampled_from(known), min_size=1, max_size=16)
    return tuple(
        m.PartGroup(
            group, draw(runs), draw(st.integers(0, 99)), draw(st.integers(1, 99)), tuple(draw(formats))
        )
        for group in sorted(draw(st.sets(st.integers(0, 9), min_size=1, max_size=3)))
    )


valid = st.one_of(
    st.builds(m.Hello, st.just((1,)), names, st.integers(0, 99), st.binary(min_size=32, max_size=32), names),
    st.builds(
        m.Subscribe,
        *(names, u63, st.binary(max_size=64), u63, page_runs(), st.booleans(), st.booleans()),
        timeout_ms=st.integers(1, MAX_TIMEOUT_MS),
        replaces=u63,
    ),
    st.builds(
        m.SubscribeParts,
        *(names, u63, u63, part_groups(), st.integers(0, 9), st.integers(1, 9), st.integers(1, 1 << 20)),
        *(st.booleans(), st.booleans(), st.integers(1, MAX_TIMEOUT_MS)),
        replaces=u63,
    ),
    st.builds(m.Grant, u63, st.integers(1, 1 << 32), st.binary(max_size=64)),
    st.builds(m.PartsReady, u63),
    st.builds(m.Failed, names, u63, names, names, st.integers(0, MAX_AGAIN_MS)),
    st.builds(m.Cancel, names, u63),
    st.builds(m.Release, names),
    st.builds(m.Renew, st.lists(names).map(tuple)),
    st.builds(m.Ask, u63, names, st.binary(max_size=64)),
    st.builds(m.Answer, u63, st.text(max_size=64), names, st.binary(max_size=64)),
)


@given(valid)
def test_every_message_survives_the_wire(message: m.Message) -> None:
    assert m.decode(m.encode(message)) == message


@given(st.binary(max_size=200))
def test_noise_is_refused_not_raised_as_anything_else(noise: bytes) -> None:
    try:
        m.decode(noise)
    except m.ProtocolError:
        pass


@given(valid, st.data())
def test_flipped_bytes_never_escape_the_bounds(message: m.Message, data: st.DataObject) -> None:
    raw = bytearray(m.encode(message))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        decoded = m.decode(bytes(raw))
    except m.ProtocolError:
        return
    if isinstance(decoded, m.Subscribe):
        assert decoded.nbytes > 0 and decoded.generation > 0
        assert all(count > 0 for part in decoded.selection for _, count in part.runs)
    if isinstance(decoded, m.Ask | m.Answer):
        assert decoded.number > 0 and len(decoded.body) <= m.MAX_BODY


def subscribe(**changes: object) -> bytes:
    good = m.Subscribe("t", 7, b"w", 4096, (m.PageRuns(0, ((0, 2),)),), True, False, 1000)
    return m.encode(msgspec.structs.replace(good, **changes))


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (subscribe(generation=0), "generation is 0"),
        (subscribe(nbytes=-1), "nbytes is -1"),
        (subscribe(timeout_ms=0), "timeout_ms is 0, allowed: 1 to 604800000"),
        (subscribe(timeout_ms=604_800_001), "timeout_ms is 604800001"),
        (subscribe(replaces=-1), "replaces is -1"),
        (subscribe(consumers=0), "consumers is 0"),
        (m.encode(m.Failed("t", 1, "busy", "", 600_001)), "again_ms is 600001"),
        (subscribe(transfer_id=""), "transfer_id has 0 characters"),
        (subscribe(transfer_id="x" * 300), "transfer_id has 300 characters"),
        (subscribe(selection=(m.PageRuns(0, ((4, 2), (5, 1))),)), "out of order"),
        (subscribe(selection=(m.PageRuns(0, ((1 << 50, 1),)),)), "too far"),
        (subscribe(selection=(m.PageRuns(1, ()), m.PageRuns(1, ()))), "group 1 twice"),
        (m.encode(m.Hello((1,), "e", 0, b"short")), "nonce has 5 bytes"),
        (m.encode(m.Failed("t", 1, "c", "x" * 5000)), "detail has 5000 characters"),
        (m.encode(m.Renew(("t",) * 513)), "number of transfer_ids is 513"),
        (m.encode(m.Renew(("t", ""))), "transfer_id has 0 characters"),
        (m.encode(m.Ask(0, "v", b"")), "number is 0"),
        (m.encode(m.Ask(1, "", b"")), "verb has 0 characters"),
        (m.encode(m.Ask(1, "v" * 65, b"")), "verb has 65 characters"),
        (m.encode(m.Ask(1, "v", b"x" * (m.MAX_BODY + 1))), f"body has {m.MAX_BODY + 1} bytes"),
        (m.encode(m.Answer(1, "c" * 65, "", b"")), "code has 65 characters"),
        (m.encode(m.Answer(1, "c", "x" * 5000, b"")), "detail has 5000 characters"),
        (m.encode(m.Answer(1, "", "", b"x" * (m.MAX_BODY + 1))), f"body has {m.MAX_BODY + 1} bytes"),
        (b"\x93\xa5hello", "not valid"),
        (b"\x94\xa6reject\xa1c\xa1d" + b"\x91" * 60_000, "not valid"),
        (m.encode(m.Hello((1,), "x" * 257, 0, bytes(32))), "engine_id has 257 characters"),
        (m.encode(m.Hello((1,) * 65, "x", 0, bytes(32))), "versions has 65 entries"),
        (m.encode(m.Hello((1,), "x", 0, bytes(32), "x" * 257)), "want has 257 characters"),
        (m.encode(m.Challenge(1, "x", -1, bytes(32), bytes(32), "", (bytes(32),))), "rank is -1"),
    ],
)
def test_bad_messages_are_named(raw: bytes, says: str) -> None:
    with pytest.raises(m.ProtocolError, match=says):
        m.decode(raw)


GROUP = m.PartGroup(1, ((0, 2),), 0, 64, (WireFormat("bf16"), WireFormat("bf16")))
PARTS = m.SubscribeParts("t", 7, 4096, (GROUP,), 0, 2, 1 << 20, True, False, 1000)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"group": -1}, "group is -1"),
        ({"group": (1 << 16) + 1}, "group is 65537"),
        ({"runs": ()}, "runs has 0 entries"),
        ({"runs": ((0, 1),) * 1025}, "runs has 1025 entries"),
        ({"runs": ((-1, 1),)}, "first layer of a run is -1"),
        ({"runs": ((0, 0),)}, "layers of a run is 0"),
        ({"first_token": -1}, "first_token is -1"),
        ({"first_token": (1 << 40) + 1}, "first_token is"),
        ({"tokens": 0}, "tokens is 0"),
        ({"tokens": (1 << 32) + 1}, "tokens is"),
        ({"formats": (WireFormat("bf16"),) * 17}, "formats has 17 entries"),
    ],
)
def test_bad_boxes_of_a_group_are_named(changes: dict[str, object], says: str) -> None:
    message = msgspec.structs.replace(PARTS, groups=(msgspec.structs.replace(GROUP, **changes),))
    with pytest.raises(m.ProtocolError, match=says):
        m.decode(m.encode(message))


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (msgspec.structs.replace(PARTS, groups=()), "groups has 0 entries"),
        (msgspec.structs.replace(PARTS, groups=(GROUP, GROUP)), "groups name 1 behind 1"),
        (msgspec.structs.replace(PARTS, generation=0), "generation is 0"),
        (msgspec.structs.replace(PARTS, consumers=0), "consumers is 0"),
        (msgspec.structs.replace(PARTS, transfer_id=""), "transfer_id has 0"),
        (msgspec.structs.replace(PARTS, first_head=-1), "first_head is -1"),
        (msgspec.structs.replace(PARTS, heads=0), "heads is 0"),
        (msgspec.structs.replace(PARTS, part_bytes=0), "part_bytes is 0"),
        (msgspec.structs.replace(PARTS, part_bytes=(16 << 20) + 1), "part_bytes is 16777217"),
        (msgspec.structs.replace(PARTS, prompt=PromptDigest(-1)), "prompt.tokens is -1"),
        (msgspec.structs.replace(PARTS, prompt=PromptDigest(1, b"x")), "prompt.digest has 1 bytes"),
        (m.Grant(0, 1, b""), "generation is 0"),
        (m.Grant(1, 0, b""), "parts is 0"),
        (m.PartsReady(0), "generation is 0"),
        (m.Cancel("", 1), "transfer_id has 0"),
        (m.Release(""), "transfer_id has 0"),
        (m.Release("t", 1, "", PromptDigest(1, b"x")), "prompt.digest has 1 bytes"),
    ],
)
def test_other_bad_fields_are_named(message: m.Message, says: str) -> None:
    with pytest.raises(m.ProtocolError, match=says):
        m.decode(m.encode(message))


def test_what_is_said_of_a_message_is_short_and_one_line() -> None:
    """It goes to the log before anybody proved who they are."""
    tag = "no tag\n" * 8000
    with pytest.raises(m.ProtocolError) as refused:
        m.decode(msgspec.msgpack.encode([tag]))
    assert str(refused.value).isprintable() and len(str(refused.value)) < 400
