# SPDX-License-Identifier: Apache-2.0
"""Digests of what was handed over are equal on both sides if, and only if, the KV is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sage_kv_connector.engine import TransferAudit
from sage_kv_connector.engine.transfer.subscription import Subscription
from tests.engine.converting_side import ConvertingSide, Shape
from tests.engine.test_conversion import TOKENS, MakeCore, pages_for, write_content

PAGES = 24
SHAPES = {"same": Shape(), "larger pages": Shape(page_size=24, packing="cpu-vec")}


class Audited:
    """Two sides that write down what they handed over."""

    def __init__(self, make_core: MakeCore, shape: Shape, path: Path) -> None:
        self.path = path
        self.prefill = ConvertingSide(make_core, Shape(), PAGES)
        self.decode = ConvertingSide(make_core, shape, PAGES)
        self.audits = [TransferAudit(path, rank) for rank in (3, 4)]
        for audit, side in zip(self.audits, (self.prefill, self.decode), strict=True):
            audit.describe(side.view, side.schema)
        self.there, self.here = pages_for(self.prefill, 1), pages_for(self.decode, 2)
        write_content(self.prefill, self.there, range(TOKENS))

    def hand_over(self) -> Subscription:
        source = self.prefill.offer("t", self.there)
        self.prefill.ready("t", source, slice(None), len(self.there))
        self.prefill.core.update("t", source.end_here)
        self.prefill.core.finish("t")
        started = self.decode.subscribe(self.prefill, "t", range(TOKENS), self.here, finished=True)
        self.received = self.decode.outcomes.get(timeout=10)
        assert self.received.ok, self.received.error
        self.audits[0].sent(source, self.prefill.released.get(timeout=5))
        return started[0]

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "audit"
    made.touch()
    return made


@pytest.mark.parametrize("shape", SHAPES)
def test_both_sides_have_one_digest(make_native_core: MakeCore, path: Path, shape: str) -> None:
    both = Audited(make_native_core, SHAPES[shape], path)
    both.audits[1].received(both.hand_over(), both.received)
    sent, received = both.lines()
    assert (sent["side"], sent["rank"], received["side"], received["rank"]) == ("producer", 3, "consumer", 4)
    assert sent["sha256"] == received["sha256"] and len(sent["sha256"]) == 64
    assert sent["parts"] == received["parts"] and bool(sent["parts"]) == (shape != "same")
    assert sent["transfer_id"] == received["transfer_id"] == "t"
    assert sent["nbytes"] == received["nbytes"] > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_a_changed_byte_changes_the_digest(make_native_core: MakeCore, path: Path, shape: str) -> None:
    both = Audited(make_native_core, SHAPES[shape], path)
    handle = both.hand_over()
    both.decode.cache[-1][both.here[0]] ^= np.uint8(1)
    both.audits[1].received(handle, both.received)
    sent, received = both.lines()
    assert sent["sha256"] != received["sha256"]


def test_nothing_is_written_for_what_failed_or_where_nobody_asks(
    make_native_core: MakeCore, path: Path
) -> None:
    both = Audited(make_native_core, Shape(), path)
    path.unlink()
    handle = both.hand_over()
    both.audits[1].received(handle, both.received)
    assert not path.exists()
    path.touch()
    both.decode.subscribe(both.prefill, "never", range(TOKENS), both.here, finished=True)
    failed = both.decode.outcomes.get(timeout=10)
    both.audits[1].received(handle, failed)
    TransferAudit(None, 0).received(handle, both.received)
    assert path.read_text() == ""
