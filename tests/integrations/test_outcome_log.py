# SPDX-License-Identifier: Apache-2.0
"""One line a transfer on each side: it names request and transfer, and warns only of failures."""

from __future__ import annotations

import json
import logging

import pytest

from sage_kv_connector.contract.failure import Code, Failure, Stage
from sage_kv_connector.contract.plan import Outcome, TransferStats
from sage_kv_connector.integrations.common.outcome_log import OutcomeLog, Side
from sage_kv_connector.telemetry.recording.flood import QUIET_S, Flood
from sage_kv_connector.telemetry.recording.json_lines import JsonFormatter

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
            "DEBUG",
            "2000000 bytes in 1.0 ms (2.00 GB/s) over tcp (stream, crc32c, fp8_e4m3 on the wire)",
        ),
        (Outcome("t-1"), "DEBUG", "not needed"),
        (ABORTED, "DEBUG", "given up: the client hung up (code cancelled, stage wait, peer e[1], 64 bytes)"),
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
    with caplog.at_level(logging.DEBUG):
        OutcomeLog(logger, side).write("cmpl-7\nforged line", outcome)
    (record,) = caplog.records
    line = record.getMessage()
    assert record.levelname == level and says in line
    assert "request cmpl-7?forged line, transfer t-1" in line and "\n" not in line


@pytest.mark.parametrize(
    ("checksum", "security", "says"),
    [
        (True, "none", "(stream, crc32c)"),
        (False, "none", "(stream)"),
        (True, "authenticated", "(stream, authenticated)"),
        (False, "encrypted", "(stream, encrypted)"),
    ],
)
def test_a_line_says_what_guards_the_bytes(
    caplog: pytest.LogCaptureFixture, checksum: bool, security: str, says: str
) -> None:
    stats = TransferStats("t-1", 8, 0.1, 0.1, "tcp", "stream", checksum, security=security)
    with caplog.at_level(logging.DEBUG):
        OutcomeLog(logger, Side.DECODE).write("r", Outcome("t-1", stats))
    assert caplog.text.rstrip().endswith(says)


def test_a_flood_of_equal_codes_is_a_warning_a_second(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    log = OutcomeLog(logger, Side.DECODE, Flood(lambda: now))
    other = FAILED._replace(failure=Failure(Code.CHECKSUM, Stage.MOVE, "another code has its own line"))
    with caplog.at_level(logging.DEBUG):
        for number in range(1000):
            log.write(f"r-{number}", FAILED)
        log.write("r", other)
        log.write("r", ABORTED)
        assert [one.levelname for one in caplog.records if one.levelno > logging.DEBUG] == ["WARNING"] * 2
        assert "request r-999," in caplog.text, "each is told to who debugs"
        now += QUIET_S
        log.write("last", FAILED)
    last = caplog.records[-1]
    assert last.levelname == "WARNING" and "(999 more of this kind since the last line)" in last.getMessage()
    assert json.loads(JsonFormatter().format(last))["untold"] == 999


def test_as_json_it_has_a_field_for_each_fact(caplog: pytest.LogCaptureFixture) -> None:
    stages = (("connect", 0.25), ("wait", 0.5))
    with caplog.at_level(logging.DEBUG):
        for outcome in (LANDED, Outcome("t-1"), ABORTED, FAILED._replace(stages=stages)):
            OutcomeLog(logger, Side.DECODE).write("cmpl-7\nforged line", outcome)
    lines = [JsonFormatter().format(record) for record in caplog.records]
    assert not any("\n" in line for line in lines)
    landed, unneeded, aborted, failed = map(json.loads, lines)
    assert [one["event"] for one in (landed, unneeded, aborted, failed)] == [
        "transfer",
        "unneeded",
        "aborted",
        "failure",
    ]
    assert (landed["code"], landed["backend"], landed["bytes"]) == ("ok", "tcp", 2_000_000)
    assert failed["time"].endswith("+00:00") and failed["message"].startswith("KV of request cmpl-7?forged")
    del failed["time"], failed["message"]
    assert failed == {
        "level": "warning",
        "event": "failure",
        "transfer": "t-1",
        "request": "cmpl-7\nforged line",
        "side": "decode",
        "peer": "e[1]",
        "backend": "",
        "code": "expired",
        "stage": "hold",
        "bytes": 64,
        "seconds": 0.75,
        "stages": {"connect": 0.25, "wait": 0.5},
        "untold": 0,
        "logger": "test_outcome_log",
    }
