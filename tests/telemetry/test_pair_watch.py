# SPDX-License-Identifier: Apache-2.0
"""A pair that quietly hands nothing over is said aloud, with its cause, and no more often than is of use."""

from __future__ import annotations

import logging

import pytest

from sage_kv_connector.telemetry.recording.pair_watch import (
    FAILED_IN_A_ROW,
    NO_PARAMETERS,
    UNPAIRED_IN_A_ROW,
)
from sage_kv_connector.telemetry.recording.recorder import Recorder
from tests.telemetry.test_recorder import record


def causes(recorder: Recorder) -> list[str]:
    """Those that hold now."""
    return [cause for cause, value in shown(recorder).items() if value]


def shown(recorder: Recorder) -> dict[str, float]:
    return {sample.labels[0]: sample.value for sample in recorder.samples() if sample.metric == "unused_pair"}


@pytest.mark.parametrize("code", ["bad_secret", "unreachable", "weights", "prompt", "expired"])
def test_failures_in_a_row_name_their_cause_and_its_remedy(
    code: str, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    for number in range(FAILED_IN_A_ROW):
        assert not causes(recorder), f"{number} are no pattern"
        recorder.add("failed_offers_total" if code == "expired" else "failed_loads_total", (code,))
    assert causes(recorder) == [code]
    (said,) = caplog.messages
    assert f"with code {code}" in said and "doctor --pair" in said and "nothing is handed over" in said
    assert [note.code for note in recorder.notes()] == [code]


def test_one_success_ends_it_and_an_abort_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    for _ in range(FAILED_IN_A_ROW):
        recorder.add("failed_loads_total", ("prompt",))
    recorder.add("aborted_loads_total")
    recorder.ended(record(code="cancelled"))
    assert causes(recorder) == ["prompt"]
    recorder.ended(record())
    assert shown(recorder) == {"prompt": 0}, "who keeps what it was told last must hear of the end"
    assert caplog.messages[-1] == "KV is handed over again"
    for _ in range(FAILED_IN_A_ROW - 1):
        recorder.add("failed_loads_total", ("prompt",))
    assert causes(recorder) == []


def test_the_most_frequent_code_is_the_cause() -> None:
    recorder = Recorder()
    for code in ("checksum", "bad_secret", "bad_secret"):
        recorder.add("failed_loads_total", (code,))
    assert causes(recorder) == ["bad_secret"]


def test_requests_that_ask_for_nothing_are_told_of_only_where_nothing_ever_was_handed_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    recorder = Recorder()
    recorder.unpaired(UNPAIRED_IN_A_ROW - 1)
    assert not causes(recorder)
    recorder.unpaired(1)
    assert causes(recorder) == [NO_PARAMETERS] and "router" in caplog.messages[0]
    recorder.ended(record())
    recorder.unpaired(100 * UNPAIRED_IN_A_ROW)
    assert causes(recorder) == []


def test_a_thousand_failures_are_a_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    recorder = Recorder()
    for _ in range(1000):
        recorder.add("failed_loads_total", ("unreachable",))
        recorder.unpaired(1)
    assert len(caplog.messages) <= 3
