# SPDX-License-Identifier: Apache-2.0
"""One line a transfer on each side: it names request and transfer, and warns only of failures."""

from __future__ import annotations

import logging

import pytest

from sage_kv_connector.contract.failure import Code, Failure, Stage
from sage_kv_connector.contract.plan import Outcome, TransferStats
from sage_kv_connector.integrations.common.outcome_log import Side, log_outcome

logger = logging.getLogger("test_outcome_log")

LANDED = Outcome("t-1", TransferStats("t-1", 2_000_000, 0.1, 0.001, "tcp", "stream", True, "fp8_e4m3"))
FAILED = Outcome("t-1", None, Failure(Code.EXPIRED, Stage.HOLD, "nobody came", "e[1]", 64))
ABORTED = Outcome("t-1", None, Failure(Code.CANCELLED, Stage.WAIT, "the client hung up", "e[1]", 64, True))


@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize(
    ("outcome", "level", "says"),
    [
        (
            LANDED,
            "INFO",
            "2000000 bytes in 1.0 ms (2.00 GB/s) over tcp (stream, crc32c, fp8_e4m3 on the wire)",
        ),
        (Outcome("t-1"), "INFO", "not needed"),
        (ABORTED, "INFO", "given up: the client hung up (code cancelled, stage wait, peer e[1], 64 bytes)"),
        (
            FAILED,
            "WARNING",
            "nobody came (code expired, stage hold, peer e[1], 64 bytes); `sage-kvt explain expired`",
        ),
    ],
    ids=["landed", "unneeded", "aborted", "failed"],
)
def test_one_line(
    caplog: pytest.LogCaptureFixture, side: Side, outcome: Outcome, level: str, says: str
) -> None:
    with caplog.at_level(logging.INFO):
        log_outcome(logger, side, "cmpl-7\nforged line", outcome)
    (record,) = caplog.records
    line = record.getMessage()
    assert record.levelname == level and says in line
    assert "request cmpl-7?forged line, transfer t-1" in line and "\n" not in line
