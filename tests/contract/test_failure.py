# SPDX-License-Identifier: Apache-2.0
"""Failure codes: one table for all of them, and what a peer says of one is only said, not trusted."""

from __future__ import annotations

import re
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from sage_kv_connector.contract.failure import Code, Reason, reason_of_peer, reason_of_text
from sage_kv_connector.contract.failure_kinds import FAILURE_KINDS

PACKAGE = Path(__file__).resolve().parents[2] / "sage_kv_connector"


def test_the_table_has_each_code_once() -> None:
    assert set(FAILURE_KINDS) == set(Code)
    assert all(kind.code is code for code, kind in FAILURE_KINDS.items())


def test_each_code_is_given_somewhere() -> None:
    """A row for what never happens would mislead."""
    table = {"failure.py", "failure_kinds.py"}
    text = "".join(path.read_text() for path in PACKAGE.rglob("*.py") if path.name not in table)
    given_ = {name for name in re.findall(r"\bCode\.([A-Z_]+)", text)} | {"OTHER"}
    if re.search(r"\bfault\(", text):
        given_.add("INTERNAL")
    assert given_ == set(Code.__members__)


@given(st.sampled_from(Code), st.text())
def test_a_reason_survives_as_text(code: Code, detail: str) -> None:
    assert reason_of_text(str(Reason(code, detail))) == Reason(code, detail)


@given(st.text(), st.text())
def test_what_a_peer_says_is_one_line_of_a_log(code: str, detail: str) -> None:
    reason = reason_of_peer(code, detail)
    assert reason.code in FAILURE_KINDS and str(reason).isprintable()


def test_an_unknown_code_is_told_with_its_name() -> None:
    assert reason_of_peer("too_hot", "69 °C") == Reason(Code.OTHER, "told by the peer (too_hot): 69 °C")
