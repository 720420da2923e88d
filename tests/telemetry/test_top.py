# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt top``: its numbers are the engines', what peers say is text, and every number fits on the screen."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from sage_kv_connector.cli.main import app
from sage_kv_connector.cli.stage_bar import stage_bar
from sage_kv_connector.cli.top_screen import TopScreen
from sage_kv_connector.contract.failure import Code, Reason
from sage_kv_connector.telemetry.reading import sources
from sage_kv_connector.telemetry.reading.overview import Overview
from sage_kv_connector.telemetry.reading.overviews import Overviews
from sage_kv_connector.telemetry.reading.sources import Found
from sage_kv_connector.telemetry.recording.histogram import Histogram
from sage_kv_connector.telemetry.recording.snapshot import (
    HotChunk,
    Link,
    Note,
    Sample,
    Snapshot,
    Times,
    TransferRecord,
)
from tests.engine.conftest import Cores, made_cores
from tests.engine.paged_side import Side, eventually

COMMAND = str(Path(sys.executable).parent / "sage-kvt")
HOSTILE = "[red]e\x1b[31m\u202e"
SAID = "[red]e?[31m?"


@pytest.fixture
def make() -> Iterator[Cores]:
    yield from made_cores(backend="tcp", host="127.0.0.1")


def hand_over(prefill: Side, decode: Side, transfer: str) -> None:
    prefill.prefilled(transfer, [1, 2, 3])
    decode.subscribe(prefill, transfer, range(3), [4, 5, 6])
    assert decode.outcomes.get(timeout=10).ok and prefill.released.get(timeout=10).ok


def busy(taken: float, sent: int, *, engine: str = "engine", times: int = 1) -> Snapshot:
    """An engine that did a bit of everything. ``sent`` bytes; ``times`` transfers ended each way."""
    ended = ("decode", engine, "tcp", "fp8_e4m3", "0")
    histogram = Histogram()
    for _ in range(times):
        histogram.add(0.01)
    counts, seconds = tuple(histogram.counts), tuple(histogram.seconds)
    record = TransferRecord(
        engine,
        "decode",
        engine,
        "tcp",
        "same",
        0,
        1 << 20,
        1 << 21,
        taken - 1,
        1.0,
        (("connect", 0.5), ("wire", 0.5)),
    )
    return Snapshot(
        engine,
        0,
        7,
        0.0,
        taken,
        (
            Sample("transfers_total", (*ended, "ok"), times),
            Sample("transfers_total", (*ended, engine), times),
            Sample("transferred_bytes_total", ended, 100 * times),
            Sample("kv_bytes_total", ended, 200 * times),
            Sample("lost_seconds_total", ("decode", engine), 2.5),
            Sample("link_bytes_total", (engine, "tcp", "sent"), sent),
            Sample("checksum_failures_total", ("tcp",), 3),
            Sample("staging_bytes", (), 16 << 20),
            Sample("staging_limit_bytes", (), 64 << 20),
        ),
        (
            Times("transfer_seconds", ("decode", "tcp"), counts, seconds),
            Times("stage_seconds", ("decode", "wire"), counts, seconds),
        ),
        links=(Link(engine, "tcp", "stream", engine, "none", True, "", sent, 0, 4_000_000.0, "10.0.0.1:7"),),
        transfers=(record, msgspec.structs.replace(record, code=engine, detail=engine)),
        hot_chunks=(HotChunk(engine, 256, 5),),
        notes=(Note(taken, engine, engine),),
    )


def two_readings(engine: str = "engine") -> Overview:
    overviews = Overviews()
    overviews.next(Found([busy(10.0, 0, engine=engine)]))
    return overviews.next(Found([busy(12.0, 2_000_000, engine=engine, times=5)], {engine: engine}))


def drawn(overview: Overview, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    with console.capture() as captured:
        console.print(TopScreen(overview, "", "no engine, [b]so[/b] wait"))
    return captured.get().splitlines()


def test_numbers_are_those_of_the_engines(make: Cores) -> None:
    prefill, decode = Side(make(), 1), Side(make(), 2)
    overviews = Overviews()
    hand_over(prefill, decode, "t0")
    first = overviews.next(sources.local())
    assert [one.transfers_per_second for one in first.engines] == [None, None], "one reading has no rates"
    for number in range(1, 4):
        hand_over(prefill, decode, f"t{number}")
    prefill.prefilled("nobody", [1])
    prefill.core.give_up(["nobody"], Reason(Code.EXPIRED, "nobody came"))
    assert not prefill.released.get(timeout=10).ok
    shown = overviews.next(sources.local())
    nbytes = sum(cache[[1, 2, 3]].nbytes for cache in prefill.cache)
    by_engine = {one.engine: one for one in shown.engines}
    out, came = by_engine[prefill.core.engine_id], by_engine[decode.core.engine_id]
    assert out.transfers_per_second is not None and out.rates_over is not None and out.bytes_per_second
    assert came.transfers_per_second is not None and came.rates_over is not None and came.bytes_per_second
    assert came.transfers_per_second["decode"] * came.rates_over == pytest.approx(3)
    assert out.transfers_per_second["prefill"] * out.rates_over == pytest.approx(4)
    assert out.failures_per_second is not None
    assert out.failures_per_second * out.rates_over == pytest.approx(1)
    assert out.bytes_per_second["sent"] * out.rates_over == pytest.approx(3 * nbytes)
    assert came.bytes_per_second["landed"] * came.rates_over == pytest.approx(3 * nbytes)
    (failure,) = shown.failures
    assert (failure.side, failure.code, failure.count) == ("prefill", "expired", 1)
    links = {one.engine: one for one in shown.links}
    link = links[decode.core.engine_id]
    assert link.peer == f"{prefill.core.engine_id}[0]" and link.sessions == 1 and link.mode == "stream"
    assert link.landed.bytes == 4 * nbytes and link.sent.bytes == 0
    assert link.landed.per_second is not None and link.landed.utilization is not None
    assert link.landed.utilization == pytest.approx(link.landed.per_second / link.capacity)
    latency = {one.side: one for one in shown.latencies}["decode"]
    assert (latency.count, latency.late_count) == (4, 3)
    assert latency.p50 and latency.p99 and latency.p50 <= latency.p99
    for side in ("decode", "prefill"):
        assert sum(one.share for one in shown.stages if one.side == side) == pytest.approx(1)
    assert {one.record.transfer_id for one in shown.transfers} == {"t0", "t1", "t2", "t3", "nobody"}


def test_engines_of_the_same_are_added_up_and_what_is_wrong_is_listed() -> None:
    shown = two_readings()
    (failure,) = shown.failures
    assert (failure.count, failure.per_second, failure.lost_seconds) == (5, 2.0, 2.5)
    assert [(one.metric, one.of, one.count) for one in shown.faults] == [
        ("checksum_failures_total", "tcp", 3)
    ]
    (wire,) = shown.wire
    assert (wire.wire_dtype, wire.bytes, wire.share, wire.compression) == ("fp8_e4m3", 500, 1, 2)
    (link,) = shown.links
    assert (link.sent.per_second, link.sent.utilization) == (1_000_000.0, 0.25)
    assert shown.silent == {"engine": "engine"}
    both = Overviews().next(Found([busy(12.0, 1), busy(12.0, 1)]))
    assert both.hot_chunks == (HotChunk("engine", 256, 10),) and both.failures[0].count == 2


@pytest.mark.parametrize("width", [80, 120, 200])
def test_every_number_fits_and_only_names_are_cut(width: int) -> None:
    lines = drawn(two_readings("e" * 70), width)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width
    for number in ("976.6 KiB/s", "25%", "1.9 MiB", "16.0 MiB 25%", "2.5 s", "500 B", "cccccccc========"):
        assert number in text, number
    assert not re.search(r"\d…", text)


@pytest.mark.parametrize("width", [80, 200])
def test_what_engines_say_is_text(width: int) -> None:
    text = "\n".join(drawn(two_readings(HOSTILE), width))
    assert "\x1b" not in text and "\u202e" not in text
    assert text.count(SAID) >= 8, "in silent, engine, link, failure, transfer, end, note and hot chunk"


def test_without_two_readings_rates_are_not_known() -> None:
    lines = drawn(Overviews().next(Found([busy(10.0, 5_000)])), 80)
    (engine,) = [line for line in lines if line.startswith("engine[0]")][:1]
    assert engine.count("–") == 5
    assert "no engine, [b]so[/b] wait" in "\n".join(drawn(Overviews().next(Found([])), 80))


def test_a_bar_has_a_letter_for_each_part_of_the_time() -> None:
    stages = (("connect", 1.0), ("wait", 2.0), ("wire", 0.0), ("news", 1.0))
    assert stage_bar(stages, 8).plain == "cc....??"
    assert stage_bar((), 8).plain == "" and stage_bar((("wire", 0.0),), 8).plain == ""


def test_the_command_prints_one_frame_or_one_object(make: Cores) -> None:
    prefill, decode = Side(make(), 1), Side(make(), 2)
    hand_over(prefill, decode, "t0")
    said = CliRunner().invoke(app, ["top", "--json", "--interval", "0.1"])
    assert said.exit_code == 0, said.output
    shown = msgspec.json.decode(said.output, type=Overview)
    assert {one.engine for one in shown.engines} == {prefill.core.engine_id, decode.core.engine_id}
    assert all(one.rates_over for one in shown.engines)
    frame = CliRunner().invoke(app, ["top", "--once", "--interval", "0.1"], env={"COLUMNS": "120"})
    assert frame.exit_code == 0 and f"{decode.core.engine_id}[0]" in frame.output
    piped = CliRunner().invoke(app, ["top", "--interval", "0.1"])
    assert piped.exit_code == 0 and "t0" in piped.output, "stdout is no terminal"


@contextmanager
def exporting(token: Path) -> Iterator[str]:
    command = [COMMAND, "exporter", "--port", "0", "--json", "--token-file", str(token)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield json.loads(server.stdout.readline())["url"]
        finally:
            server.terminate()


def test_from_an_exporter_it_shows_the_same_and_wants_the_token(make: Cores, tmp_path: Path) -> None:
    side = Side(make(), 1)
    token = tmp_path / "token"
    token.write_text("a-token\n")
    with exporting(token) as url:
        words = ["top", url, "--json", "--interval", "0.1"]
        said = CliRunner().invoke(app, [*words, "--token-file", str(token)])
        assert json.loads(said.stdout)["engines"][0]["engine"] == side.core.engine_id
        refused = CliRunner().invoke(app, words)
        assert refused.exit_code == 2 and "401: it wants a token" in " ".join(refused.stderr.split())
    gone = CliRunner().invoke(app, [*words, "--token-file", str(token)])
    assert gone.exit_code == 2 and url in gone.stderr


def test_without_engines_it_says_what_to_do(place: Path) -> None:
    said = CliRunner().invoke(app, ["top", "--once", "--interval", "0.1"])
    words = " ".join(said.stdout.split())
    assert said.exit_code == 1
    for hint in ("No engine of user", str(place)[:20], "telemetry=false", "$SAGE_KVT_TELEMETRY_DIR"):
        assert hint in words
    as_json = CliRunner().invoke(app, ["top", "--json", "--interval", "0.1"])
    assert as_json.exit_code == 1 and json.loads(as_json.stdout)["engines"] == []
    assert "No engine of user" in as_json.stderr
    place.mkdir(mode=0o755)
    place.chmod(0o755)
    refused = CliRunner().invoke(app, ["top", "--once", "--interval", "0.1"])
    assert refused.exit_code == 2 and "has mode 755" in " ".join(refused.stderr.split())
    for url in ("ftp://host", "host:9464"):
        wrong = CliRunner().invoke(app, ["top", url, "--once"])
        assert wrong.exit_code == 2 and "must begin with http" in " ".join(wrong.stderr.split())


def test_on_a_terminal_it_goes_on_until_it_is_told_to_end(make: Cores) -> None:
    prefill, decode = Side(make(), 1), Side(make(), 2)
    hand_over(prefill, decode, "t0")
    process, terminal = pty.fork()
    if process == 0:
        # Of a test run in the background it is ignored, and would be here, too.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.execve(COMMAND, [COMMAND, "top", "--interval", "0.1"], {**os.environ, "TERM": "xterm"})
    seen = bytearray()

    def frames() -> bool:
        seen.extend(os.read(terminal, 1 << 16))
        return seen.count(b"KV transport") >= 3

    try:
        eventually(frames, 60)
        os.write(terminal, b"\x03")
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                os.read(terminal, 1 << 16)
            except OSError:
                break
        else:
            pytest.fail("Ctrl-C did not end it")
    except BaseException:
        os.kill(process, signal.SIGKILL)  # or it waits for a reader for ever
        raise
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    os.close(terminal)
    assert prefill.core.engine_id.encode() in seen
