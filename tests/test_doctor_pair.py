# SPDX-License-Identifier: Apache-2.0
"""``doctor --pair`` names what keeps two servers from handing KV over. The servers here are stand-ins that answer as
real ones were seen to; real ones: integration_tests/test_doctor_pair.py.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from sage_kv_connector.doctor import pair
from sage_kv_connector.doctor.pair import examine_pair

RANKS = {"remote_ranks": {"0": ["tcp://10.0.0.5:7000"]}, "do_remote_prefill": True}
#: Counted by decode, by how its load ended.
METRICS = """
vllm:sage_kvt_transfers_total{{engine="0",side="decode",peer="p",backend="tcp",code="ok"}} {ok}
vllm:sage_kvt_transferred_bytes_total{{engine="0",side="decode",peer="p",backend="tcp"}} {ok}000
vllm:sage_kvt_failed_loads_total{{engine="0",code="prompt"}} 0
vllm:sage_kvt_failed_loads_total{{engine="0",code="{code}"}} {failed}
"""


class StandIn:
    """As much of a vLLM server as the check asks. ``ends``: what becomes of a load here: ok, a code, or nothing."""

    def __init__(self, offers: dict[str, Any] | None = None, ends: str = "", connector: bool = True) -> None:
        self.offers, self.ends, self.connector = offers, ends, connector
        self.loads = 0

    def get(self, path: str) -> tuple[int, str]:
        if path == "/v1/models":
            return 200, json.dumps({"data": [{"id": "m"}]})
        if path == "/metrics":
            failed = self.loads if self.ends not in ("ok", "") else 0
            ok = self.loads if self.ends == "ok" else 0
            text = METRICS.format(ok=ok, failed=failed, code=self.ends or "other")
            return 200, text if self.connector else "vllm:num_requests_running 0"
        return 404, "{}"

    def post(self, body: dict[str, Any]) -> tuple[int, str]:
        params = body.get("kv_transfer_params") or {}
        if params.get("do_remote_decode"):
            return 200, json.dumps({"choices": [{}], "kv_transfer_params": self.offers})
        self.loads += bool(params.get("do_remote_prefill"))
        return 200, json.dumps({"choices": [{}]})


@contextmanager
def served(server: Any) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(*server.get(self.path))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(*server.post(json.loads(body)))

        def _answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None: ...

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()


def verdict(prefill: Any, decode: Any) -> tuple[str, str]:
    with served(prefill) as there, served(decode) as here:
        last = examine_pair(there, here)[-1]
    assert last.name == "hand-over"
    return last.state, last.detail


def test_a_pair_that_works_says_what_arrived() -> None:
    state, said = verdict(StandIn(RANKS), StandIn(ends="ok"))
    assert state == "ok" and "1000 bytes of KV arrived" in said


@pytest.mark.parametrize("code", ["bad_secret", "unreachable", "weights", "prompt", "schema"])
def test_a_failed_load_is_told_by_its_code_with_its_remedy(code: str) -> None:
    state, said = verdict(StandIn(RANKS), StandIn(ends=code))
    assert state == "broken" and said.startswith(f"{code}: ")
    assert "10.0.0.5:7000" in said, "where prefill says that it listens"


@pytest.mark.parametrize(
    ("prefill", "decode", "said"),
    [
        (lambda: StandIn(None), StandIn, "no_connector: prefill offered nothing"),
        (lambda: StandIn({"remote_host": "x"}), StandIn, "no_connector: prefill's connector is another one"),
        (lambda: StandIn(RANKS), lambda: StandIn(connector=False), "no_connector: decode's /metrics has no"),
        (lambda: StandIn(RANKS), lambda: StandIn(ends=""), "unasked: decode answered and fetched nothing"),
    ],
)
def test_servers_that_are_no_pair_are_told_what_is_missing(
    prefill: Callable[[], StandIn], decode: Callable[[], StandIn], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair, "STEP_S", 0.01)
    state, found = verdict(prefill(), decode())
    assert state == "broken" and found.startswith(said)


class Sglang:
    """As much of an SGLang server."""

    def __init__(self, mode: str, says: dict[str, Any] | None = None, backend: str = "sage_kvt") -> None:
        self.info = {
            "disaggregation_mode": mode,
            "disaggregation_transfer_backend": backend,
            "disaggregation_bootstrap_port": 8998,
        }
        self.says = says or {"type": "length"}
        self.asked: list[dict[str, Any]] = []

    def get(self, path: str) -> tuple[int, str]:
        if path == "/v1/models":
            return 200, json.dumps({"data": [{"id": "m"}]})
        return 200, json.dumps(self.info)

    def post(self, body: dict[str, Any]) -> tuple[int, str]:
        self.asked.append(body)
        return 200, json.dumps({"text": "", "meta_info": {"finish_reason": self.says}})


def test_sglang_is_asked_in_one_room() -> None:
    prefill, decode = Sglang("prefill"), Sglang("decode")
    assert verdict(prefill, decode)[0] == "ok"
    (there,), (here,) = prefill.asked, decode.asked
    assert there == here and there["bootstrap_port"] == 8998 and there["bootstrap_host"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("prefill", "decode", "said"),
    [
        (
            Sglang("decode"),
            Sglang("decode"),
            "wrong_role: .* has --disaggregation-mode decode, must have prefill",
        ),
        (Sglang("prefill"), Sglang("decode", backend="nixl"), "no_connector: .*backend nixl"),
        (
            Sglang("prefill"),
            Sglang(
                "decode",
                {"type": "abort", "message": "room 3: did not arrive (code bad_secret, stage connect)"},
            ),
            "bad_secret: The two servers do not have the same secret",
        ),
    ],
)
def test_sglang_servers_that_hand_nothing_over(prefill: Sglang, decode: Sglang, said: str) -> None:
    state, found = verdict(prefill, decode)
    import re

    assert state == "broken" and re.match(said, found), found


def test_who_does_not_answer_is_named() -> None:
    with served(StandIn(RANKS)) as there:
        findings = examine_pair(there, "http://127.0.0.1:1")
        assert [(one.name, one.state) for one in findings] == [("prefill", "ok"), ("decode", "broken")]
        assert "127.0.0.1:1/v1/models" in findings[-1].detail
        assert "must begin with http" in examine_pair("x", there)[0].detail
