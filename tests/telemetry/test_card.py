# SPDX-License-Identifier: Apache-2.0
"""The card's numbers and files, as they are served. What browsers make of them: integration_tests/test_card.py."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from sage_kv_connector.contract.failure import Code
from sage_kv_connector.telemetry.reading.card import page as page_module
from sage_kv_connector.telemetry.reading.card import router as router_module
from sage_kv_connector.telemetry.reading.card.page import CHARTS, page_files
from sage_kv_connector.telemetry.reading.card.router import card_router
from sage_kv_connector.telemetry.reading.exporter import create_app
from sage_kv_connector.telemetry.reading.gathered import FAULTS
from sage_kv_connector.telemetry.reading.sources import Found, Source
from sage_kv_connector.telemetry.recording.metrics import METRICS, PREFIX
from sage_kv_connector.telemetry.recording.snapshot import Sample, Snapshot, TransferRecord
from tests.telemetry.card_traffic import Traffic, traffic
from tests.telemetry.http_reader import reader

PAGE = Path(__file__).resolve().parents[2] / "web" / "card" / "page"
HOSTILE = '<img src=x onerror="alert(1)">'


@pytest.fixture(autouse=True)
def ask_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "FRESH", 0.0)


@pytest.fixture(scope="module")
def moving() -> Iterator[Traffic]:
    with traffic() as made:
        made.move()
        made.move()
        made.fail()
        yield made


def client(source: Source) -> TestClient:
    app = FastAPI()
    app.include_router(card_router(source), prefix="/card")
    return TestClient(app)


def shown(source: Source) -> dict[str, Any]:
    answer = client(source).get("/card/card.json")
    assert answer.status_code == 200
    return dict(answer.json())


class Scraped:
    """What the exporter's /metrics says of the same engines."""

    def __init__(self, source: Source) -> None:
        text = reader(create_app(source)).get("/metrics").text
        self._samples = [one for family in text_string_to_metric_families(text) for one in family.samples]

    def of(self, metric: str, **labels: str) -> float:
        """The sum of the series that have these labels."""
        return sum(
            one.value
            for one in self._samples
            if one.name == PREFIX + metric and labels.items() <= one.labels.items()
        )


def test_numbers_are_those_of_metrics_at_that_moment(moving: Traffic) -> None:
    taken = moving.source()
    card, scraped = shown(lambda: taken), Scraped(lambda: taken)
    assert len(card["engines"]) == scraped.of("engines") == 6
    for link in card["links"]:
        where = {name: str(link[name]) for name in ("engine", "rank", "peer", "backend")}
        assert link["sent"] == scraped.of("link_bytes_total", direction="sent", **where)
        assert link["landed"] == scraped.of("link_bytes_total", direction="landed", **where)
        assert link["transfers"] == scraped.of("transfers_total", **where)
        best = scraped.of("link_capacity_bytes_per_second", source="best", **where)
        nic = scraped.of("link_capacity_bytes_per_second", source="nic", **where)
        assert (link["capacity"], link["source"]) == ((nic, "nic") if nic else (best, "best"))
        assert link["failed"] == link["transfers"] - scraped.of("transfers_total", code="ok", **where)
    for total, metric, labels in (
        ("sent", "link_bytes_total", {"direction": "sent"}),
        ("landed", "link_bytes_total", {"direction": "landed"}),
        ("transfers", "transfers_total", {}),
    ):
        assert sum(link[total] for link in card["links"]) == scraped.of(metric, **labels) > 0, total
    work: dict[str, float] = {}
    for engine in card["engines"]:
        for kind, seconds in engine["work"].items():
            work[kind] = work.get(kind, 0) + seconds
    for kind in ("encode", "decode"):
        assert work[kind] == pytest.approx(scraped.of("conversion_seconds_total", work=kind)) != 0
        assert card["converted_bytes"][kind] == scraped.of("converted_bytes_total", work=kind) > 0
    for kind in ("send", "place", "verify", "copy"):
        assert work.get(kind, 0) == pytest.approx(scraped.of("lane_seconds_total", work=kind))
    for one in card["compression"]:
        for field in ("transferred_bytes", "kv_bytes"):
            expected = scraped.of(f"{field}_total", side="decode", wire_dtype=one["wire_dtype"])
            assert one[field] == expected > 0
    assert {one["wire_dtype"] for one in card["compression"]} == {"same", "fp8_e4m3"}
    (failure,) = card["failures"]
    where = {"side": failure["side"], "code": failure["code"]}
    assert failure["count"] == scraped.of("transfers_total", **where) == 1
    assert failure["lost_seconds"] == scraped.of("lost_seconds_total", **where) > 0
    assert failure["meaning"] and failure["remedy"] and failure["detail"]
    for fault in card["faults"]:
        (label,) = METRICS[fault["metric"]].labels
        assert fault["value"] == scraped.of(fault["metric"], **{label: fault["of"]}) > 0


def test_times_are_those_of_the_histograms(moving: Traffic) -> None:
    taken = moving.source()
    card = shown(lambda: taken)
    for side in ("prefill", "decode"):
        own = [
            times
            for one in taken.snapshots
            for times in one.times
            if times.metric == "transfer_seconds" and times.labels[0] == side
        ]
        (counts,) = [one["counts"] for one in card["durations"] if one["side"] == side]
        assert counts == [sum(column) for column in zip(*(times.counts for times in own), strict=True)]
        assert len(counts) == len(card["buckets"]) + 1
    wire = [one for one in card["stages"] if (one["side"], one["stage"]) == ("decode", "wire")]
    expected = [
        times
        for one in taken.snapshots
        for times in one.times
        if (times.metric, times.labels) == ("stage_seconds", ("decode", "wire"))
    ]
    assert [one["count"] for one in wire] == [sum(sum(times.counts) for times in expected)] == [6]
    assert wire[0]["seconds"] == pytest.approx(sum(sum(times.seconds) for times in expected))


def test_choices_hot_chunks_and_transfers_are_those_of_the_engines(moving: Traffic) -> None:
    card = shown(moving.source)
    tcp = [one for one in card["choices"] if one["backend"] == "tcp" and one["engine"] == "decode-0"]
    assert tcp and tcp[0]["mode"] and tcp[0]["checksum"] is True
    assert all(one["conversion"] for one in card["choices"] if one["engine"] == "decode-1")
    assert [chunk["tokens"] for chunk in card["hot_chunks"]] == [256, 512]
    assert {chunk["handovers"] for chunk in card["hot_chunks"]} == {2}
    ends = [one["record"]["began"] + one["record"]["seconds"] for one in card["transfers"]]
    assert ends == sorted(ends, reverse=True) and len(ends) == 13
    (link,) = [link for link in card["links"] if (link["engine"], link["open"]) == ("decode-0", True)]
    assert link["recent"] == 2 and 0 < link["wire_seconds"] <= link["seconds"]
    assert link["capacity"] > 0 and link["source"] in ("nic", "best")


@pytest.mark.parametrize(
    ("known", "shown_as"),
    [({"nic": 9.0, "best": 2.0}, (9.0, "nic")), ({"best": 2.0}, (2.0, "best")), ({"nic": 0.0}, (0.0, ""))],
)
def test_a_link_can_carry_what_its_card_says_else_what_was_best(
    known: dict[str, float], shown_as: tuple[float, str]
) -> None:
    speeds = [
        Sample("link_capacity_bytes_per_second", ("p[0]", "tcp", source), speed)
        for source, speed in known.items()
    ]
    moved = Sample("link_bytes_total", ("p[0]", "tcp", "sent"), 1)
    (link,) = shown(lambda: Found([Snapshot("e", 0, 1, 0, 1, (*speeds, moved), ())]))["links"]
    assert (link["capacity"], link["source"]) == shown_as


def test_an_unknown_code_is_shown_as_it_is_and_explained_as_other() -> None:
    labels = ("decode", "p[0]", "tcp", "same", "0", HOSTILE)
    one = Snapshot("e", 0, 1, 0, 1, (Sample("transfers_total", labels, 3),), ())
    (failure,) = shown(lambda: Found([one]))["failures"]
    assert (failure["code"], failure["count"], failure["at"]) == (HOSTILE, 3, None)
    assert "does not know" in failure["meaning"]


def test_a_transfer_that_nobody_fetched_is_a_link_of_nobody() -> None:
    record = TransferRecord("t", "prefill", "", "", "", 0, 0, 0, 5.0, 1.0, (("hold", 1.0),), "expired", "x")
    sample = Sample("transfers_total", ("prefill", "", "", "", "0", "expired"), 1)
    card = shown(lambda: Found([Snapshot("e", 0, 1, 0, 1, (sample,), (), transfers=(record,))]))
    (link,) = card["links"]
    assert (link["peer"], link["open"], link["failed"], link["seconds"]) == ("", False, 1, None)
    assert card["failures"][0]["at"] == 6.0


def test_what_went_wrong_is_an_alert_and_what_did_not_is_none() -> None:
    counted = (
        Sample("checksum_failures_total", ("tcp",), 2),
        Sample("checksum_failures_total", ("shm",), 0),
        Sample("dials_total", ("ok",), 5),
        Sample("dials_total", ("unreachable",), 1),
        Sample("chunks_total", ("tcp", "sent"), 9),
    )
    two = [Snapshot("e", rank, 1, 0, 1, counted, ()) for rank in range(2)]
    faults = shown(lambda: Found(two))["faults"]
    assert [(one["metric"], one["of"], one["value"]) for one in faults] == [
        ("checksum_failures_total", "tcp", 4),
        ("dials_total", "unreachable", 2),
    ]


def test_engines_that_do_not_answer_are_an_alert() -> None:
    card = shown(lambda: Found([], {"17-x.sock": "timed out"}))
    assert card["faults"] == [{"metric": "silent_engines", "of": "17-x.sock: timed out", "value": 1}]


def test_a_source_that_fails_is_said_and_asked_again() -> None:
    answers: list[Found | Exception] = [PermissionError("no\nway"), Found([])]

    def source() -> Found:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    served = client(source)
    refused = served.get("/card/card.json")
    assert refused.status_code == 503 and refused.json() == {"error": "PermissionError: no?way"}
    assert served.get("/card/").status_code == 200
    assert served.get("/card/card.json").json()["engines"] == []


def test_engines_are_asked_once_for_all_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "FRESH", 3600.0)
    asked = []

    def source() -> Found:
        asked.append(1)
        return Found([])

    served = client(source)
    for _ in range(5):
        assert served.get("/card/card.json").status_code == 200
    assert asked == [1]


def test_nothing_is_inline_or_from_elsewhere(moving: Traffic) -> None:
    served = client(moving.source)
    for name in ("", "card.json", *page_files()):
        if name == "index.html":
            continue
        answer = served.get(f"/card/{name}")
        assert answer.status_code == 200, name
        policy = dict(
            part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";")
        )
        assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        media_type = answer.headers["content-type"].partition(";")[0]
        assert (media_type == "text/html") == (name == "")
    html = served.get("/card/").text
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", html)
    for path in PAGE.iterdir():
        urls = set(re.findall(r"https?://[\w.:-]+", path.read_text())) - {
            "http://www.w3.org",
            "http://HOST:PORT",
        }
        assert urls == set(), path.name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|DOMParser", path.read_text()
        )


def test_a_page_of_another_site_can_not_read_the_numbers(moving: Traffic) -> None:
    served = client(moving.source)
    for site, status in (("cross-site", 403), ("same-origin", 200), ("none", 200)):
        answer = served.get("/card/card.json", headers={"Sec-Fetch-Site": site})
        assert answer.status_code == status and ("engines" in answer.json()) == (status == 200)


def test_files_beyond_the_page_are_not_served(moving: Traffic) -> None:
    served = client(moving.source)
    for name in ("router.py", "..%2Frouter.py", "digest", "index.html.bak", "%2e%2e/page.py"):
        assert served.get(f"/card/{name}").status_code == 404, name


def test_without_npm_the_card_has_no_charts_and_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(PAGE, tmp_path / "page")
    monkeypatch.setattr(page_module, "files", lambda _: tmp_path)
    assert not set(CHARTS) & set(page_files())
    assert shown(lambda: Found([]))["charts"] is False
    (tmp_path / "built").mkdir()
    for name in CHARTS[:2]:
        (tmp_path / "built" / name).write_text("x")
    assert not set(CHARTS) & set(page_files()), "without its licence the library is not served"
    (tmp_path / "built" / CHARTS[2]).write_text("x")
    assert shown(lambda: Found([]))["charts"] is True
    assert client(lambda: Found([])).get("/card/charts.js").status_code == 200


def test_an_installation_without_the_page_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "files", lambda _: tmp_path)
    with pytest.raises(FileNotFoundError, match="the card's page is not in this installation"):
        card_router(lambda: Found([]))


def words(language: str) -> dict[str, str]:
    (body,) = re.findall(rf"const {language} = \{{\n(.*?)\n\}};", (PAGE / "words.js").read_text(), re.DOTALL)
    return dict(re.findall(r'^  (\w+): "(.*)",$', body, re.MULTILINE))


def test_both_languages_have_the_same_words() -> None:
    english, chinese = words("en"), words("zh")
    assert list(english) == list(chinese) and len(english) > 100
    for key, text in english.items():
        assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", chinese[key])), key
    assert not [key for key, text in english.items() if not text or re.search("[\u4e00-\u9fff]", text)]


def test_every_word_that_is_used_is_there() -> None:
    sources = "".join(path.read_text() for path in PAGE.glob("*.js"))
    used = set(re.findall(r'\bt\("(\w+)"', sources)) | set(FAULTS)
    assert len(used) > 80 and used - set(words("en")) == set()


def test_every_failure_code_has_its_meaning_in_chinese() -> None:
    codes = re.findall(
        r"^  (\w+): \[\"(.+?)\", \"(.+?)\"\],$", (PAGE / "codes_zh.js").read_text(), re.MULTILINE
    )
    assert {code for code, *_ in codes} == set(Code)
    assert all(re.search("[\u4e00-\u9fff]", text) for _, *texts in codes for text in texts)
