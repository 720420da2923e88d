# SPDX-License-Identifier: Apache-2.0
"""``sglang:sage_kvt_*`` at the /metrics of real SGLang servers; ``make check-telemetry`` does more of it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from integration_tests.telemetry_phases import PAIR, Verdict, run_phase

pytestmark = pytest.mark.skipif(find_spec("sglang") is None, reason="runs in SGLang's environment")


def test_bytes_and_failures_are_those_that_were_sent_and_injected(scratch: Path) -> None:
    from integration_tests.telemetry_sglang import sglang_load

    verdict = Verdict("sglang")
    with sglang_load(scratch) as load:
        run_phase(load, verdict, PAIR, ("weights", "secret", "flipped"))
        shown = load.pair.read()["decode", "/metrics"]
    assert verdict.wrong == dict.fromkeys(verdict.wrong, [])
    assert {row["bytes"]["transfers"] for row in verdict.rows} == {26, 2}, "something was sent"
    families = {series.metric for series, value in shown.ours() if value}
    assert {"transfers_total", "stage_seconds", "failed_loads_total", "sessions", "chunks_total"} <= families
    assert all("tp_rank" in dict(series.labels) for series, _ in shown.ours())
