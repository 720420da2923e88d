# SPDX-License-Identifier: Apache-2.0
"""Bad options end an SGLang server before it logs its arguments; a secret among them is not shown."""

from __future__ import annotations

import json

import pytest

from sage_kv_connector.integrations.sglang import plugin
from sage_kv_connector.integrations.sglang.given_options import why_refused
from sage_kv_connector.integrations.sglang.options import CONFIG_ENV

SECRET = "correct-horse-battery"
BACKEND = ["--disaggregation-mode", "prefill", "--disaggregation-transfer-backend", "sage_kvt"]


def hicache(module: str = "sage_kv_connector.integrations.sglang.hicache", **transport: object) -> list[str]:
    extra = {"module_path": module, "address": "tcp://h:1", "transport": transport, "prefetch_threshold": 64}
    return ["--hicache-storage-backend-extra-config", json.dumps(extra)]


@pytest.mark.parametrize(
    ("words", "variable", "says"),
    [
        (
            BACKEND,
            "backend=rdmaa",
            "backend is 'rdmaa' (from $SAGE_KVT_CONFIG); allowed: auto, ",
        ),
        (BACKEND, "nothing", "option 'nothing' is not of the form key=value (from $SAGE_KVT_CONFIG)"),
        (
            ["--disaggregation-transfer-backend=sage_kvt"],
            "port=70000",
            "port is 70000 (from $SAGE_KVT_CONFIG)",
        ),
        (
            hicache(lease_s=0),
            "",
            "lease_s is 0 (from transport in --hicache-storage-backend-extra-config); allowed: a number above 0",
        ),
        (
            ["=".join(hicache(secret=SECRET))],
            "",
            "transport.secret in --hicache-storage-backend-extra-config is **********, and SGLang would log it; "
            "allowed: a secret_file, or $SAGE_KVT_SECRET",
        ),
    ],
)
def test_a_bad_option_ends_the_server_at_once(
    monkeypatch: pytest.MonkeyPatch, words: list[str], variable: str, says: str
) -> None:
    monkeypatch.setenv(CONFIG_ENV, variable)
    monkeypatch.setattr("sys.argv", ["launch_server", *words])
    with pytest.raises(SystemExit) as ended:
        plugin.register()
    assert str(ended.value).startswith(f"sage_kvt: {says}")
    assert SECRET not in str(ended.value)


@pytest.mark.parametrize(
    "words",
    [
        [*BACKEND, *hicache(lease_s=5)],
        hicache("of.another", secret=SECRET),
        ["--hicache-storage-backend-extra-config", "@file.json"],
        ["--hicache-storage-backend-extra-config"],
        [],
    ],
)
def test_good_options_and_those_of_others_are_let_through(words: list[str]) -> None:
    assert why_refused(words) == ""


def test_who_does_not_ask_for_us_is_not_kept_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG_ENV, "backend=rdmaa")
    assert why_refused(["--disaggregation-transfer-backend", "mooncake"]) == ""
