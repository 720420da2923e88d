# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench control`` and ``bench beside``: what they moved is right, and every figure is there."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from sage_kv_connector.bench.beside import bench_beside
from sage_kv_connector.cli.main import app


def test_each_way_of_a_hand_over_has_its_row() -> None:
    words = ["bench", "control", "--layers", "4", "--tokens", "100,256", "--repeats", "2", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    rows = result["rows"]
    assert {(row["mode"], row["backend"], row["tokens"]) for row in rows} == {
        (mode, backend, tokens)
        for mode in ("whole", "streamed", "converted")
        for backend in ("shm", "tcp")
        for tokens in (100, 256)
    }
    assert all(row["right"] and row["prefill_ms"] > 0 and row["engine_thread_ms"] > 0 for row in rows)
    assert [first["backend"] for first in result["first_byte"]] == ["shm", "tcp"]


@pytest.mark.parametrize(
    "words", [["--tokens", "x"], ["--tokens", "0"], ["--backends", "pcie"], ["--modes", ""]]
)
def test_a_bad_option_is_named(words: list[str]) -> None:
    done = CliRunner().invoke(app, ["bench", "control", *words])
    assert done.exit_code == 2 and words[0] in done.output


def test_a_thread_beside_transfers_is_counted() -> None:
    result = bench_beside("shm", 4, 64, 50, 1)
    assert result["right"] and result["handed_over"] > 10 and result["ratio"] > 0
