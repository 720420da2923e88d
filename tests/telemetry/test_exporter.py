# SPDX-License-Identifier: Apache-2.0
"""The exporter: what Prometheus reads is what engines counted, and nobody reads it who may not."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as text_metrics

from sage_kv_connector.telemetry.reading import sources
from sage_kv_connector.telemetry.reading.exporter import create_app
from sage_kv_connector.telemetry.reading.readers import check_listens
from sage_kv_connector.telemetry.reading.token import token_of_secret
from sage_kv_connector.telemetry.recording.metrics import METRICS, PREFIX, Kind
from sage_kv_connector.telemetry.recording.snapshot import Snapshot
from tests.engine.conftest import Cores, made_cores
from tests.engine.paged_side import Side
from tests.telemetry.http_reader import reader


@pytest.fixture
def make() -> Iterator[Cores]:
    yield from made_cores(backend="tcp", host="127.0.0.1")


def handed_over(make: Cores) -> tuple[Side, Side]:
    prefill, decode = Side(make(), 1), Side(make(), 2)
    prefill.prefilled("t", [1, 2, 3])
    decode.subscribe(prefill, "t", range(3), [4, 5, 6])
    assert decode.outcomes.get(timeout=10).ok and prefill.released.get(timeout=10).ok
    return prefill, decode


def test_prometheus_reads_what_the_engines_counted(make: Cores) -> None:
    prefill, decode = handed_over(make)
    client = reader(create_app(sources.local))
    text = client.get("/metrics").text
    found = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_metrics(text)
        for sample in family.samples
    }
    assert found["sage_kvt_engines", ()] == 2 and found["sage_kvt_silent_engines", ()] == 0
    for side in (prefill, decode):
        taken = side.core.snapshot()
        who = {"engine": taken.engine, "rank": "0"}
        for sample in taken.samples:
            metric = METRICS[sample.metric]
            if metric.kind is Kind.GAUGE or "seconds" in sample.metric:
                continue
            labels = who | dict(zip(metric.labels, sample.labels, strict=True))
            assert found[f"{PREFIX}{sample.metric}", tuple(sorted(labels.items()))] == sample.value
        for one in taken.times:
            labels = who | dict(zip(METRICS[one.metric].labels, one.labels, strict=True))
            key = tuple(sorted(labels.items()))
            assert found[f"{PREFIX}{one.metric}_count", key] == sum(one.counts) > 0
            assert found[f"{PREFIX}{one.metric}_sum", key] == pytest.approx(sum(one.seconds))
            last = tuple(sorted((labels | {"le": "+Inf"}).items()))
            assert found[f"{PREFIX}{one.metric}_bucket", last] == sum(one.counts)
    wanted = {"accept": "application/openmetrics-text; version=1.0.0"}
    assert list(open_metrics(client.get("/metrics", headers=wanted).text))  # type: ignore[no-untyped-call]


def test_snapshot_is_what_the_readers_of_an_exporter_get(make: Cores) -> None:
    handed_over(make)
    client = reader(create_app(sources.local))
    found = sources.found_of(client.get("/snapshot").content)
    assert sum(one.value("transfers_total") for one in found.snapshots) == 2
    assert client.get("/healthz").json() == {"ok": True, "engines": 2, "silent": 0}


def test_a_silent_engine_makes_it_unhealthy() -> None:
    silent = sources.Found([], {"7-0.sock": "timed out"})
    answer = reader(create_app(lambda: silent)).get("/healthz")
    assert answer.status_code == 503 and answer.json()["silent"] == 1


def test_without_a_token_only_loopback_is_answered_and_listened_on() -> None:
    client = reader(create_app(lambda: sources.Found([])), base_url="http://attacker.example")
    assert client.get("/metrics").status_code == 421
    assert client.get("/healthz").status_code == 200
    for host in ("127.0.0.1", "localhost", "[::1]", "127.9.9.9"):
        assert (
            reader(create_app(lambda: sources.Found([])), base_url=f"http://{host}")
            .get("/metrics")
            .is_success
        )
        check_listens(host, "")
    for host in ("0.0.0.0", "10.0.0.1", "::", "localhost.example", ""):
        with pytest.raises(ValueError, match="--token-file"):
            check_listens(host, "")
        check_listens(host, "a token")
    afar = reader(create_app(lambda: sources.Found([])), "http://127.0.0.1", "10.0.0.7")
    assert afar.get("/metrics").status_code == 403


def test_with_a_token_every_path_wants_it() -> None:
    token = token_of_secret(b"the secret")
    client = reader(create_app(lambda: sources.Found([]), token), base_url="http://10.0.0.1")
    for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": f"Bearer {token}é".encode()}):
        for path in ("/metrics", "/snapshot", "/nowhere", "/"):
            assert client.get(path, headers=headers).status_code == 401  # type: ignore[arg-type]
    assert client.get("/metrics", headers={"Authorization": f"Bearer {token}"}).is_success
    assert client.get("/healthz").is_success


def test_a_browser_sends_the_token_as_a_password_and_shows_the_card() -> None:
    client = reader(create_app(lambda: sources.Found([]), "a:token"), base_url="http://10.0.0.1")
    assert client.get("/").headers["WWW-Authenticate"].startswith("Basic realm=")
    for user, password in (("anybody", "a:token"), ("", "a:token")):
        page = client.get("/", auth=(user, password))
        assert (
            page.status_code == 200
            and page.url.path == "/kv-transport/"
            and "<kv-transport-card" in page.text
        )
        assert client.get("/kv-transport/card.json", auth=(user, password)).json()["engines"] == []
    for wrong in ("a", "a:tokens", ""):
        assert client.get("/kv-transport/card.json", auth=("a:token", wrong)).status_code == 401
    for odd in ("Basic", "Basic !", "Basic /w==", "Basic YTp0b2tlbg==", "basic"):
        assert client.get("/kv-transport/", headers={"Authorization": odd}).status_code == 401, odd


def test_the_command_serves_and_says_where(place: Path, tmp_path: Path, make: Cores) -> None:
    prefill, _ = handed_over(make)
    token = tmp_path / "token"
    token.write_text("a-token\n")
    command = [str(Path(sys.executable).parent / "sage-kvt"), "exporter", "--port", "0", "--json"]
    with subprocess.Popen(
        [*command, "--token-file", str(token)], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            said = json.loads(server.stdout.readline())
            assert said["token"]
            found = sources.exporter(said["url"], "a-token")()
            assert prefill.core.engine_id in [one.engine for one in found.snapshots]
            with pytest.raises(OSError, match="401: it wants a token"):
                sources.exporter(said["url"])()
            with urllib.request.urlopen(f"{said['url']}/healthz") as answer:
                assert json.load(answer)["engines"] == 2
        finally:
            server.terminate()
    refused = subprocess.run([*command, "--host", "0.0.0.0"], capture_output=True, text=True)
    assert refused.returncode == 2 and "host is '0.0.0.0', which others reach" in refused.stderr


def test_engines_that_say_they_are_the_same_are_added_up() -> None:
    from sage_kv_connector.telemetry.reading.prometheus import families
    from sage_kv_connector.telemetry.recording.snapshot import Sample

    twice = [Snapshot("e", 0, pid, 0, 0, (Sample("offers", (), 2),), ()) for pid in (1, 2)]
    (offers,) = [family for family in families(twice) if family.name == "sage_kvt_offers"]
    assert [sample.value for sample in offers.samples] == [4]
