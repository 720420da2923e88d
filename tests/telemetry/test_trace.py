# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt trace``: both sides of a transfer, in order and inside one another; bad files by the field."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sage_kv_connector.cli.main import app
from sage_kv_connector.contract.failure import Code, Reason
from sage_kv_connector.telemetry.reading import sources
from sage_kv_connector.telemetry.reading.request_way import Way, way_of_file
from tests.engine.conftest import Cores, made_cores
from tests.engine.paged_side import Side

#: 2026-01-01, in nanoseconds.
BEGAN = 1_767_225_600_000_000_000
TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def make() -> Iterator[Cores]:
    yield from made_cores(backend="tcp", host="127.0.0.1")


@pytest.fixture
def snapshot(make: Cores, tmp_path: Path) -> Path:
    """Three transfers: the second one failed."""
    prefill, decode = Side(make(), 1), Side(make(), 2)
    for transfer in ("first", "nobody", "last"):
        prefill.prefilled(transfer, [1, 2])
        if transfer == "nobody":
            prefill.core.give_up([transfer], Reason(Code.EXPIRED, "nobody came"))
        else:
            decode.subscribe(prefill, transfer, range(2), [4, 5])
            assert decode.outcomes.get(timeout=10).ok
        prefill.released.get(timeout=10)
    path = tmp_path / "snapshot.json"
    path.write_bytes(sources.body_of(sources.local()))
    return path


def span(name: str, number: int, parent: int = 0, at: int = 0, took: int = 10, **more: Any) -> dict[str, Any]:
    """``at``, ``took``: milliseconds. ``transfer``, ``code``: attributes of ours. As the collector writes them."""
    attributes = [
        {"key": f"sage_kvt.{key}", "value": {"stringValue": more.pop(word)}}
        for word, key in (("transfer", "transfer_id"), ("code", "code"))
        if word in more
    ]
    return {
        "traceId": more.pop("trace", TRACE),
        "spanId": f"{number:016x}",
        "parentSpanId": f"{parent:016x}" if parent else "",
        "name": name,
        "kind": 1,
        "startTimeUnixNano": str(BEGAN + at * 1_000_000),
        "endTimeUnixNano": str(BEGAN + (at + took) * 1_000_000),
        "attributes": [*attributes, {"key": "http.status", "value": {"intValue": "200"}}],
        "status": {},
        **more,
    }


def exported(service: str, *spans: Mapping[str, Any]) -> dict[str, Any]:
    resource = {"attributes": [{"key": "service.name", "value": {"stringValue": service}}]}
    return {"resourceSpans": [{"resource": resource, "scopeSpans": [{"scope": {}, "spans": list(spans)}]}]}


def written(path: Path, *objects: object) -> Path:
    path.write_text("\n".join(json.dumps(one) for one in objects) + "\n")
    return path


def a_request(path: Path) -> Path:
    """A router's request: prefill offers and sends, decode loads. Each process writes its own line."""
    event = {"timeUnixNano": str(BEGAN + 25_000_000), "name": "first page"}
    return written(
        path,
        exported("decode", span("sage_kvt.load", 4, 1, 20, 30, transfer="t-1", events=[event])),
        {"resourceMetrics": []},
        exported("prefill", span("sage_kvt.send", 3, 2, 22, 20, transfer="t-1")),
        exported("prefill", span("sage_kvt.offer", 2, 1, 5, 60, transfer="t-1")),
        exported("router", span("request", 1, 0, 0, 100)),
        exported("router", span("another", 9, 0, 500, 1, trace="f" * 32)),
    )


def test_both_sides_of_a_transfer_are_joined_from_a_snapshot(snapshot: Path) -> None:
    way = way_of_file(snapshot, "last")
    sides = {step.name: step for step in way.steps if step.depth == 0}
    assert set(sides) == {"prefill", "decode"} and way.steps[0].at == 0
    assert sides["prefill"].of != sides["decode"].of and not sides["decode"].code
    assert sides["decode"].attributes["backend"] == "tcp" and sides["decode"].attributes["peer"]
    parent, end = way.steps[0], 0.0
    for step in way.steps:
        if step.depth == 0:
            parent, end = step, step.at
            continue
        assert step.at == pytest.approx(end, abs=1e-9), "stages follow each other"
        end = step.at + step.seconds
        assert end <= parent.at + parent.seconds + 1e-3


def test_the_newest_that_failed_is_chosen_else_the_newest(snapshot: Path, tmp_path: Path) -> None:
    way = way_of_file(snapshot)
    assert way.transfer == "nobody"
    assert [(step.name, step.code, step.detail) for step in way.steps] == [
        ("prefill", "expired", "nobody came"),
        ("compute", "", ""),
        ("hold", "expired", ""),
    ]
    body = json.loads(snapshot.read_text())
    for engine in body["engines"]:
        engine["transfers"] = [one for one in engine["transfers"] if one["code"] == "ok"]
    assert way_of_file(written(tmp_path / "well", body)).transfer == "last"
    assert way_of_file(written(tmp_path / "one", body["engines"][0])).transfer == "last", "an engine's own"


def test_spans_are_a_tree_over_all_processes(tmp_path: Path) -> None:
    way = way_of_file(a_request(tmp_path / "traces.json"))
    assert [(step.name, step.depth, step.of) for step in way.steps] == [
        ("request", 0, "router"),
        ("sage_kvt.offer", 1, "prefill"),
        ("sage_kvt.send", 2, "prefill"),
        ("sage_kvt.load", 1, "decode"),
    ]
    assert [round(step.at * 1000) for step in way.steps] == [0, 5, 22, 20]
    assert [round(step.seconds * 1000) for step in way.steps] == [100, 60, 20, 30]
    assert way.transfer == "t-1" and way.traces == (TRACE,)
    (moment,) = way.steps[3].moments
    assert (moment.name, round(moment.at * 1000)) == ("first page", 25)
    assert way.steps[3].attributes == {"transfer_id": "t-1"}, "of ours, without the prefix"


def test_a_file_of_one_object_may_be_written_in_lines(tmp_path: Path) -> None:
    path = tmp_path / "pretty.json"
    path.write_text(json.dumps(exported("decode", span("sage_kvt.load", 1, transfer="t")), indent=2))
    assert way_of_file(path).transfer == "t"


def test_sides_in_different_traces_are_joined_by_the_transfer(tmp_path: Path) -> None:
    other = "b" * 32
    path = written(
        tmp_path / "traces",
        exported("prefill", span("sage_kvt.offer", 1, transfer="t", trace=other)),
        exported("decode", span("sage_kvt.load", 2, 0, 3, transfer="t"), span("more", 3, 2, 4, 1)),
    )
    for chosen in ("", "t"):
        way = way_of_file(path, chosen)
        assert [(step.name, step.depth) for step in way.steps] == [
            ("sage_kvt.offer", 0),
            ("sage_kvt.load", 0),
            ("more", 1),
        ]
        assert way.traces == (TRACE, other)


def test_a_failed_span_of_ours_is_chosen_before_newer_ones(tmp_path: Path) -> None:
    failed = {"code": 2, "message": "nobody came"}
    path = written(
        tmp_path / "traces",
        exported(
            "d", span("sage_kvt.load", 1, transfer="bad", code="expired", status=failed, trace="a" * 32)
        ),
        exported("d", span("sage_kvt.load", 2, at=50, transfer="good", code="ok", trace="b" * 32)),
        exported("r", span("request", 3, at=90, status={"code": "STATUS_CODE_ERROR"}, trace="c" * 32)),
    )
    way = way_of_file(path)
    assert (way.transfer, way.steps[0].code, way.steps[0].detail) == ("bad", "expired", "nobody came")
    assert way_of_file(path, "good").steps[0].code == ""


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=12)
)
def test_every_span_is_told_once_behind_its_parent(
    tmp_path_factory: pytest.TempPathFactory, given_: Sequence[tuple[int, int, int]]
) -> None:
    """Parents that are not there, that are the span itself, and circles of them, too."""
    spans = [span(str(n), n, parent, at, took) for n, (parent, at, took) in enumerate(given_, 1)]
    path = written(tmp_path_factory.mktemp("trees") / "traces", exported("s", *spans), exported("s", *spans))
    steps = way_of_file(path).steps
    assert sorted(int(step.name) for step in steps) == list(range(1, len(given_) + 1))
    assert min(step.at for step in steps) == 0
    open_: list[int] = []
    for step in steps:
        del open_[step.depth :]
        parent = given_[int(step.name) - 1][0]
        if step.depth:
            assert open_[-1] == parent
        open_.append(int(step.name))


BAD = {
    "nothing": ("", "line 1: no JSON|no span"),
    "text": ("a log line\n", "line 1: no JSON"),
    "a list": ("[]", "line 1: a JSON list, must be an object"),
    "something else": ('{"a": 1}', "line 1: no field resourceSpans"),
    "a second line": (json.dumps(exported("s")) + "\n{", "line 2: no JSON"),
    "no spans": (json.dumps(exported("s")), "resourceSpans: no span in it"),
    "spans": ('{"resourceSpans": 3}', r"`\$.resourceSpans`"),
    "an engine": ('{"engines": [{"engine": 1}], "silent": {}}', r"`\$.engine`"),
    "engines": ('{"engines": 7, "silent": {}}', "not an exporter's /snapshot"),
    "no transfers": ('{"engines": [], "silent": {}}', "engines: none of 0 has a transfer"),
    "deep": ("[" * 100_000, "no JSON"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_an_error_that_names_the_place(kind: str, tmp_path: Path) -> None:
    text, error = BAD[kind]
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=error):
        way_of_file(path)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("traceId", "0", r"spans\[0\].traceId"),
        ("spanId", "x" * 16, r"spans\[0\].spanId"),
        ("startTimeUnixNano", "soon", r"spans\[0\].startTimeUnixNano"),
        ("startTimeUnixNano", "-1", r"spans\[0\].startTimeUnixNano"),
        ("endTimeUnixNano", "1", r"spans\[0\].endTimeUnixNano is 1, must be at least startTimeUnixNano"),
        ("attributes", [{"value": {}}], r"missing required field `key`.*attributes"),
        ("events", [{"name": "x"}], r"timeUnixNano.*spans\[0\].events\[0\]"),
        ("status", 5, r"spans\[0\].status"),
    ],
)
def test_a_bad_span_is_an_error_that_names_the_field(
    tmp_path: Path, field: str, value: object, error: str
) -> None:
    path = written(
        tmp_path / "t", exported("s", span("good", 1)), exported("s", {**span("bad", 2), field: value})
    )
    with pytest.raises(ValueError, match=error) as refused:
        way_of_file(path)
    assert "line 2" in str(refused.value)


def test_a_transfer_that_is_not_there_is_named_with_some_that_are(snapshot: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"transfer is 'x', which .* does not have; allowed: one of 3, such as"
    ):
        way_of_file(snapshot, "x")
    with pytest.raises(ValueError, match=r"transfer is 'x'.*one of 1, such as t-1"):
        way_of_file(a_request(tmp_path / "traces"), "x")


def said(*words: str) -> Any:
    return CliRunner().invoke(app, ["trace", *words], env={"COLUMNS": "100"})


def test_the_command_prints_the_way(tmp_path: Path, snapshot: Path) -> None:
    path = a_request(tmp_path / "traces.json")
    result = said(str(path))
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and lines[0].startswith("transfer t-1, began 20")
    assert [line.split()[0] for line in lines if "sage_kvt." in line] == ["5.0", "22.0", "20.0"]
    assert "· first page" in result.stdout and TRACE in " ".join(lines)
    failed = said(str(snapshot)).stdout
    assert "failed: expired (sage-kvt explain CODE)" in " ".join(failed.split()) and "nobody came" in failed
    way = json.loads(said(str(path), "--json").stdout)
    assert [step["name"] for step in way["steps"]][1] == "sage_kvt.offer"
    assert Way(**{**way, "steps": (), "traces": tuple(way["traces"])}).transfer == "t-1"


def test_the_command_says_what_is_wrong_and_prints_text_as_text(tmp_path: Path) -> None:
    nowhere = said(str(tmp_path / "none"))
    assert nowhere.exit_code == 2 and "can't be read: No such file" in " ".join(nowhere.stderr.split())
    bad = said(str(written(tmp_path / "bad", {"resourceSpans": [{"scopeSpans": [{"spans": [{}]}]}]})))
    assert bad.exit_code == 2 and "traceId" in bad.stderr
    hostile = "[red]\x1b[31mx"
    event = {"timeUnixNano": str(BEGAN), "name": hostile}
    path = written(
        tmp_path / "hostile",
        exported(
            hostile,
            span(hostile, 1, transfer=hostile, code=hostile, events=[event], status={"message": hostile}),
        ),
    )
    result = said(str(path))
    assert result.exit_code == 0 and "\x1b" not in result.stdout
    assert result.stdout.count("[red]?[31mx") >= 5
    assert "\x1b" not in said(str(path), "--transfer", "\x1b[31m").stderr
