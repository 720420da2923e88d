# SPDX-License-Identifier: Apache-2.0
"""What a producer refuses to convert before anything is read, and where parts go."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from sage_kv_connector.backends.base import Event, EventKind, Status
from sage_kv_connector.contract.failure import Code
from sage_kv_connector.engine.pages.source import SelectionError
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.transfer.offer import Stream
from sage_kv_connector.engine.transfer.part_sender import PartSender
from tests.engine.test_messages import PARTS


@pytest.mark.parametrize(
    ("first", "heads", "asked"), [(1, 2, "1 to 2"), (3, 2, "3 to 4"), (2, 3, "2 to 4"), (0, 9, "0 to 8")]
)
def test_heads_of_another_rank_are_named(first: int, heads: int, asked: str) -> None:
    here: Any = SimpleNamespace(
        schema=SimpleNamespace(head_start=2, head_count=2, head_end=4), conversions=None
    )
    nothing: Any = None
    request = msgspec.structs.replace(PARTS, first_head=first, heads=heads)
    with pytest.raises(SelectionError, match=f"heads: 2 to 3 here, {asked} asked for"):
        PartSender(request, nothing, nothing, here, nothing, nothing)


def test_the_first_grant_names_the_window() -> None:
    """A peer that grants again moves nothing to another place."""
    session: Any = SimpleNamespace(peer=None, connection=1)
    stream, granted = Stream(session, PARTS), list[int]()
    stream.grant(m.Grant(7, 1, b"early"))
    assert stream.window == b"", "it is not served yet"
    part: Any = SimpleNamespace(granted=granted.append)
    stream.part = part
    for window, parts in ((b"first", 2), (b"second", 9)):
        stream.grant(m.Grant(7, parts, window))
    assert (stream.window, granted) == (b"first", [2])


@pytest.mark.parametrize(
    ("by_lanes", "status", "code"),
    [
        (True, Status.OK, None),
        (True, Status.BEYOND_END, Code.TOKENS),
        (True, Status.OUT_OF_BOUNDS, Code.BAD_SELECTION),
        (True, Status.CONNECTION_LOST, Code.SEND_FAILED),
        (False, Status.OUT_OF_BOUNDS, Code.SEND_FAILED),
        (False, Status.NOT_CONVERTED, Code.CONVERSION),
    ],
)
def test_what_went_wrong_with_a_post_has_its_name(by_lanes: bool, status: Status, code: Code | None) -> None:
    session: Any = SimpleNamespace(peer=None, connection=1)
    stream = Stream(session, PARTS)
    stream.by_lanes = by_lanes
    trouble = stream.trouble(Event(EventKind.SENT, 1, 1, status, 0, 0, 0, b"", "so it said"))
    assert (trouble.code if trouble else None) == code
