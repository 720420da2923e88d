# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench routed``: what its rows say of rounds in which a peer may be missing. No server is started."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from sage_kv_connector.bench import routed
from sage_kv_connector.cli.main import app


def _one(ttft_s: float, after_prefill_s: float, *, right: bool = True) -> dict[str, Any]:
    return {"ttft_s": ttft_s, "after_prefill_s": after_prefill_s, "right": right}


def test_ours_is_held_against_the_others_of_its_round() -> None:
    rounds = [
        {"ours": _one(1.1, 0.1), "ours, prefill first": _one(1.5, 0.5), "NIXL push": _one(1.4, 0.4)},
        {"ours": _one(1.2, 0.2), "ours, prefill first": _one(1.5, 0.5), "NIXL push": _one(1.9, 0.9)},
        {"ours": _one(1.2, 0.2), "ours, prefill first": _one(1.5, 0.4, right=False)},
    ]
    rows = {row["contender"]: row for row in routed._rows(2048, rounds)}
    assert rows["ours"]["to_first"] == 0.4  # of 0.2, 0.4 and 0.5
    assert rows["ours"]["to_best_peer"] == (0.1 / 0.4 + 0.2 / 0.9) / 2  # the last round has none
    assert rows["NIXL push"]["ttft_s"] == (1.4 + 1.9) / 2 and rows["NIXL push"]["to_best_peer"] is None
    assert rows["ours"]["right"] and not rows["ours, prefill first"]["right"]
    result = {
        "rows": [rows["ours, prefill first"]],
        "prefill_attention": "stubbed",
        "missing": {"NIXL pull": "no\nmore"},
    }
    table = dict(routed.routed_rows(result))
    assert "WRONG TOKEN IDS" in table["2048 tokens"] and table["NIXL pull"] == "left out: no"


def test_ours_alone_has_nothing_to_be_held_against() -> None:
    (row,) = routed._rows(2048, [{"ours": _one(1.0, 0.1)}])
    assert row["to_first"] is None and row["to_best_peer"] is None


def test_another_peer_is_refused_by_name() -> None:
    done = CliRunner().invoke(app, ["bench", "routed", "--against", "mooncake"])
    assert done.exit_code == 2 and "--against" in done.output
