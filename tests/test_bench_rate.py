# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench rate`` and ``bench sessions``: every figure is there, and what can't be measured is said."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from sage_kv_connector.bench.sessions import TooManySessions, allow_descriptors
from sage_kv_connector.cli.main import app


def run(*words: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["bench", *words, "--json"])
    assert done.exit_code == 0, done.output
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture(autouse=True)
def descriptors() -> Iterator[tuple[int, int]]:
    """The limits, which are set again at the end, as are the cores."""
    limits, cores = resource.getrlimit(resource.RLIMIT_NOFILE), os.sched_getaffinity(0)
    yield limits
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    os.sched_setaffinity(0, cores)


def test_arrivals_at_a_rate_are_all_handed_over() -> None:
    words = ("--per-second", "40", "--seconds", "1", "--layers", "4", "--tokens", "100")
    result = run("rate", *words)
    assert [(row["mode"], row["backend"], row["asked"]) for row in result["rows"]] == [
        (mode, backend, 60) for backend in ("shm", "tcp") for mode in ("whole", "streamed")
    ]
    for row in result["rows"]:
        assert row["right"] and 20 < row["a_second"] < 60
        assert all(row[fifth][q] > 0 for fifth in ("first_fifth", "last_fifth") for q in ("p50_ms", "p99_ms"))
        assert all(0 < row[side][part] < 100 for side in ("prefill", "decode") for part in row[side])


def test_many_sessions_are_open_and_what_they_hold_is_said(descriptors: tuple[int, int]) -> None:
    most = len(os.listdir("/proc/self/fd")) + 700
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, descriptors[1]))  # raised as far as it must
    held = [os.dup(0) for _ in range(600)]  # as a process that does much else has
    try:
        result = run("sessions", "--sessions", "70", "--seconds", "1")
    finally:
        for descriptor in held:
            os.close(descriptor)
    assert [(row["backend"], row["sessions"]) for row in result["rows"]] == [("shm", 70), ("tcp", 70)]
    for row in result["rows"]:
        for side in ("asking", "answering"):
            assert row[side]["descriptors"] >= 1 and "own_bytes" in row[side]
            assert row[side]["control_percent"] < 50 and row[side]["lanes_percent"] < 50
        assert row["answering"]["own_bytes"] > 0  # a process of its own, which had nothing to use again
        assert row["ask_us"] > 0 and row["ask_us_of_one"] > 0


def test_a_limit_that_is_too_low_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    with pytest.raises(TooManySessions, match=r"1000 sessions need up to \d+ .* hard limit is 4096"):
        allow_descriptors(1000)
    allow_descriptors(10)
    done = CliRunner().invoke(app, ["bench", "sessions", "--sessions", "1000"])
    assert done.exit_code == 1 and "ulimit -Hn" in done.output


@pytest.mark.parametrize(
    "words",
    [["rate", "--backends", "pcie"], ["rate", "--modes", "converted"], ["sessions", "--backends", ""]],
)
def test_a_bad_option_is_named(words: list[str]) -> None:
    done = CliRunner().invoke(app, ["bench", *words])
    assert done.exit_code == 2 and words[1] in done.output
