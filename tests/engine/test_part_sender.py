# SPDX-License-Identifier: Apache-2.0
"""What a producer refuses to convert, before anything is read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from sage_kv_connector.engine.pages.source import SelectionError
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
