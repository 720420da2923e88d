# SPDX-License-Identifier: Apache-2.0
"""Log lines: as JSON they are ours only, each failure is told once, and no secret is in them."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.failure import Code, Reason
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.engine.transfer.consumer import Consumer
from sage_kv_connector.engine.transfer.posts import Posts
from sage_kv_connector.integrations.common.outcome_log import OutcomeLog
from sage_kv_connector.integrations.common.outcome_log import Side as TellingSide
from sage_kv_connector.integrations.vllm.logs import follow_vllm_logging
from sage_kv_connector.telemetry.recording.flood import QUIET_S, Flood
from sage_kv_connector.telemetry.recording.json_lines import PACKAGE, JsonHandler, facts, use_log_format
from tests.engine.conftest import Cores, made_cores
from tests.engine.paged_side import Side

SECRET = "correct horse battery staple"
logger = logging.getLogger(f"{PACKAGE}.test_log_lines")


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """Ours, vLLM's and the root, as they were before. Ours begins as it does in a process of its own."""
    kept = [
        (one, list(one.handlers), one.level, one.propagate)
        for one in map(logging.getLogger, (PACKAGE, "vllm", ""))
    ]
    ours = logging.getLogger(PACKAGE)
    ours.handlers[:] = []
    ours.setLevel(logging.NOTSET)
    ours.propagate = True
    yield
    for one, handlers, level, propagate in kept:
        one.handlers[:] = handlers
        one.setLevel(level)
        one.propagate = propagate


@pytest.fixture
def make() -> Iterator[Cores]:
    yield from made_cores(backend="tcp", host="127.0.0.1", log_format="json", secret=SECRET)


@pytest.fixture
def make_text() -> Iterator[Cores]:
    yield from made_cores(backend="tcp", host="127.0.0.1")


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def hand_over(prefill: Side, decode: Side, transfer: str) -> tuple[Outcome, Outcome]:
    prefill.prefilled(transfer, [1, 2, 3])
    decode.subscribe(prefill, transfer, range(3), [4, 5, 6])
    return prefill.released.get(timeout=10), decode.outcomes.get(timeout=10)


def test_engines_write_an_object_a_line_with_what_the_transfer_was(
    capfd: pytest.CaptureFixture[str], make: Cores
) -> None:
    logging.getLogger(PACKAGE).setLevel(logging.DEBUG)
    root = io.StringIO()
    logging.getLogger().addHandler(logging.StreamHandler(root))
    prefill, decode = Side(make(), 1), Side(make(), 2)
    out, came = hand_over(prefill, decode, "t-1")
    OutcomeLog(logger, TellingSide.PREFILL).write("cmpl-1", out)
    OutcomeLog(logger, TellingSide.DECODE).write("cmpl-1", came)
    text = capfd.readouterr().err
    found = objects(text)
    assert all({"time", "level", "event", "logger", "message"} <= set(one) for one in found)
    sent, landed = [one for one in found if one["event"] == "transfer"]
    for one, core, peer in ((sent, prefill.core, decode.core), (landed, decode.core, prefill.core)):
        (record,) = core.snapshot().transfers
        assert (one["level"], one["transfer"], one["request"], one["code"]) == (
            "debug",
            "t-1",
            "cmpl-1",
            "ok",
        )
        assert (one["side"], one["peer"], one["backend"]) == (record.side, f"{peer.engine_id}[0]", "tcp")
        assert one["bytes"] == record.nbytes and one["stages"] == dict(record.stages)
        assert one["seconds"] == pytest.approx(record.seconds)
    assert SECRET not in text and len(found) > 2
    assert root.getvalue() == "", "no line of ours is told twice"
    logging.getLogger("sglang").warning("the engine's own")
    assert root.getvalue() == "the engine's own\n" and not capfd.readouterr().err


def test_a_failure_has_the_stages_that_it_came_to(make_text: Cores) -> None:
    prefill = Side(make_text(), 1)
    prefill.prefilled("nobody", [1])
    prefill.core.give_up(["nobody"], Reason(Code.EXPIRED, "nobody came"))
    outcome = prefill.released.get(timeout=10)
    (record,) = prefill.core.snapshot().transfers
    assert outcome.failure is not None and outcome.stages == record.stages
    assert [stage for stage, _ in outcome.stages] == ["compute", "hold"]


@pytest.mark.parametrize("side", ["decode", "prefill"])
def test_a_fault_of_ours_is_a_warning_once_with_its_place(
    side: str, make_text: Cores, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def planted(*_: object, **__: object) -> None:
        raise KeyError("planted")

    if side == "decode":
        monkeypatch.setattr(Consumer, "_fetch", planted)
    else:
        monkeypatch.setattr(Posts, "prepare", planted)
    prefill, decode = Side(make_text(), 1), Side(make_text(), 2)
    with caplog.at_level(logging.DEBUG, PACKAGE):
        prefill.prefilled("t-1", [1, 2, 3])
        decode.subscribe(prefill, "t-1", range(3), [4, 5, 6])
        here = (decode.outcomes if side == "decode" else prefill.released).get(timeout=10)
        OutcomeLog(logger, TellingSide(side)).write("cmpl-1", here)
    assert here.failure is not None and here.failure.code is Code.INTERNAL
    warned = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
    assert len(warned) == 1 and "KeyError: 'planted' (test_log_lines.py:" in warned[0]
    assert [one for one in caplog.records if one.exc_info and one.levelno == logging.DEBUG], (
        "with its traceback"
    )


def test_with_text_nothing_changes() -> None:
    ours = logging.getLogger(PACKAGE)
    before = (list(ours.handlers), ours.level, ours.propagate)
    use_log_format("text")
    assert (list(ours.handlers), ours.level, ours.propagate) == before


def test_json_is_chosen_once_and_for_all(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced = io.StringIO()
    monkeypatch.setattr("sys.stderr", replaced)
    for log_format in ("json", "json", "text"):
        use_log_format(log_format)
    ours = logging.getLogger(PACKAGE)
    assert [type(one) for one in ours.handlers] == [JsonHandler] and not ours.propagate
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logger.exception("a fault of %s", "ours", extra=facts("fault", peer="p", odd={1, 2}))
    (said,) = objects(capfd.readouterr().err)
    assert replaced.getvalue() == "", "an engine may write something before each line of sys.stderr"
    assert (said["event"], said["level"], said["message"]) == ("fault", "error", "a fault of ours")
    assert said["peer"] == "p" and "ValueError: two\nlines" in said["exception"]


def test_in_vllm_lines_follow_its_level_and_as_text_its_handlers() -> None:
    ours, vllm, theirs = logging.getLogger(PACKAGE), logging.getLogger("vllm"), logging.StreamHandler()
    vllm.handlers[:] = [theirs]
    vllm.setLevel(logging.DEBUG)
    follow_vllm_logging("text")
    assert ours.handlers == [theirs] and ours.level == logging.DEBUG and not ours.propagate
    ours.handlers.clear()
    ours.setLevel(logging.NOTSET)
    follow_vllm_logging("json")
    follow_vllm_logging("json")
    assert [type(one) for one in ours.handlers] == [JsonHandler] and ours.level == logging.DEBUG
    assert vllm.handlers == [theirs], "vLLM's own stay as they are"


def test_a_format_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"log_format.*'yaml'.*text.*json"):
        KVTransportConfig.load({"log_format": "yaml"})


def test_a_kind_is_told_once_in_a_time_with_what_was_not_told() -> None:
    now = 0.0
    flood = Flood(lambda: now)
    assert [flood.untold("a"), flood.untold("a"), flood.untold("b", 3), flood.untold("a", 5)] == [
        0,
        None,
        2,
        None,
    ]
    now = QUIET_S
    assert [flood.untold("a"), flood.untold("b"), flood.untold("a")] == [6, 0, None]
