# SPDX-License-Identifier: Apache-2.0
"""The Grafana dashboard by others' measure: a PromQL parser, Grafana's own models, a real Prometheus over real engines.

make test-card; what is not to be had is skipped with a reason.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from integration_tests.card_browser import serving
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.telemetry.reading.exporter import create_app
from scripts.grafana_dashboard import DASHBOARD, dashboard
from tests.telemetry.card_traffic import traffic

#: What Grafana fills in.
FILLED = {"$__rate_interval": "15s", "$__range": "1m", "$engine": ".*"}


def expressions() -> list[tuple[str, str]]:
    return [
        (panel["title"], target["expr"])
        for panel in dashboard()["panels"]
        for target in panel.get("targets", ())
    ]


def filled(expression: str) -> str:
    for name, value in FILLED.items():
        expression = expression.replace(name, value)
    return expression


@pytest.mark.parametrize(("title", "expression"), expressions())
def test_a_promql_parser_takes_each_expression(title: str, expression: str) -> None:
    parser = pytest.importorskip("promql_parser", reason="make test-card installs it (locks/card.txt)")
    parser.parse(filled(expression))
    with pytest.raises(ValueError):
        parser.parse(filled(expression) + ")")


def lost(given: Any, kept: Any, where: str = "dashboard") -> list[str]:
    """What a model dropped or changed of a document; empty values may go."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return [one for key, value in given.items() for one in lost(value, kept.get(key), f"{where}.{key}")]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return [one for at, value in enumerate(given) for one in lost(value, kept[at], f"{where}[{at}]")]
    empty = given in ({}, [], "", False) and not kept
    return [] if given == kept or empty else [f"{where}: {given!r} became {kept!r}"]


def test_grafanas_own_models_know_every_field() -> None:
    """They are made of Grafana's schemas: a field or value that these do not have gets lost on the way."""
    models = pytest.importorskip(
        "grafana_foundation_sdk.models.dashboard", reason="make test-card installs it"
    )
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins

    register_default_plugins()

    def there_and_back(document: Any) -> Any:
        return json.loads(JSONEncoder().encode(models.Dashboard.from_json(document)))

    document = json.loads(DASHBOARD.read_text())
    assert lost(document, there_and_back(document)) == []
    document["panels"][1]["reduceOption"] = 1
    assert lost(document, there_and_back(document)) == ["dashboard.panels[1].reduceOption: 1 became None"]


def test_a_real_prometheus_answers_every_panel(tmp_path: Path) -> None:
    prometheus = shutil.which("prometheus")
    if prometheus is None:
        pytest.skip("no Prometheus is installed (Debian/Ubuntu: apt-get install prometheus)")
    with traffic() as engines, serving(create_app(engines.source)) as url:
        engines.move()
        engines.fail()
        target = url.removeprefix("http://")
        (tmp_path / "prometheus.yml").write_text(
            "global: {scrape_interval: 1s}\n"
            f"scrape_configs: [{{job_name: kv, static_configs: [{{targets: ['{target}']}}]}}]\n"
        )
        address = f"127.0.0.1:{free_port()}"
        with (tmp_path / "log").open("w") as log:
            server = subprocess.Popen(
                [prometheus, f"--config.file={tmp_path / 'prometheus.yml'}",
                 f"--storage.tsdb.path={tmp_path / 'data'}", f"--web.listen-address={address}"],
                stdout=log, stderr=log,
            )  # fmt: skip
        try:

            def asked(expression: str) -> list[Any]:
                query = urllib.parse.urlencode({"query": filled(expression)})
                try:
                    with urllib.request.urlopen(
                        f"http://{address}/api/v1/query?{query}", timeout=10
                    ) as answer:
                        return list(json.loads(answer.read())["data"]["result"])
                except urllib.error.HTTPError as error:
                    raise AssertionError(f"{expression}: {error.read().decode()}") from error
                except urllib.error.URLError:
                    assert server.poll() is None, (tmp_path / "log").read_text()
                    return []

            until = time.monotonic() + 60
            while not asked("sum(rate(sage_kvt_link_bytes_total[15s])) > 0"):
                assert time.monotonic() < until, (tmp_path / "log").read_text()
                engines.move()
                engines.fail()
                time.sleep(0.5)
            silent = [expression for _, expression in expressions() if not asked(expression)]
        finally:
            server.terminate()
            server.wait(30)
    # A pair that works is none that hands nothing over; nothing was sent, refused or dialled in vain here.
    assert [one for one in silent if not any(name in one for name in ABSENT)] == []
    assert len(silent) < len(expressions()) / 4


ABSENT = ("unused_pair", "refused_peers_total", "dials_total", "retries_total", "recomputed_tokens_total")
