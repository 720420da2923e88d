# SPDX-License-Identifier: Apache-2.0
"""Where prefill is: rooms, ranks, and what its bootstrap server answers to either engine."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_kv_connector.contract.bootstrap_room import MAX_ROOM, MetadataKind, parse_room
from sage_kv_connector.integrations.common.bootstrap_answers import query_bootstrap
from sage_kv_connector.integrations.common.prefill_ranks import (
    DecodeRank,
    PrefillEngine,
    PrefillRank,
    ranks_of,
    read_peers,
)
from sage_kv_connector.integrations.vllm.bootstrap import MAX_ASKERS, BootstrapServer
from sage_kv_connector.integrations.vllm.remote_prefill import parse_remote

ADDRESSES = {rank: (f"tcp://127.0.0.1:{rank + 1}",) for rank in range(4)}
ENGINE = PrefillEngine(ranks_of("e", ADDRESSES, "node"), 2, MetadataKind.FIRST_TOKEN)
ROOM = {"bootstrap_host": "10.0.0.1", "bootstrap_port": 8998, "bootstrap_room": 5}


def test_a_room_names_prefill_and_transfer() -> None:
    assert parse_room(ROOM, on_decode=True) == ("http://10.0.0.1:8998", 5)
    assert parse_room({"bootstrap_room": 5}, on_decode=False) == ("", 5)
    assert parse_room({}, on_decode=True) is None
    ipv6 = parse_room(ROOM | {"bootstrap_host": "::1"}, on_decode=True)
    assert ipv6 is not None and ipv6.url == "http://[::1]:8998"


@pytest.mark.parametrize(
    ("field", "value"),
    [("bootstrap_room", 0), ("bootstrap_room", MAX_ROOM + 1), ("bootstrap_room", "5"), ("bootstrap_room", True),
     ("bootstrap_host", ""), ("bootstrap_host", None), ("bootstrap_port", 0), ("bootstrap_port", "8998")],
)  # fmt: skip
def test_a_bad_room_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} is {re.escape(repr(value))}"):
        parse_room(ROOM | {field: value}, on_decode=True)


def test_vllm_takes_a_room_or_what_its_prefill_answered() -> None:
    in_room = parse_remote({"do_remote_prefill": True, **ROOM})
    assert in_room.transfer_id == "sglang-5" and in_room.bootstrap == "http://10.0.0.1:8998"
    assert in_room.companions == ("sglang-5-aux",) and not in_room.finished
    answered = {
        "transfer_id": "sglang-5", "remote_engine_id": "e", "remote_ranks": {"0": ["tcp://h:1"], "1": ["tcp://h:2"]},
        "remote_node": "n", "pp_size": 1, "in_room": True,
    }  # fmt: skip
    known = parse_remote(ROOM | answered)
    assert known.finished and known.companions == ("sglang-5-aux",) and known.prefill is not None
    assert [rank.addresses for rank in known.prefill.ranks] == [("tcp://h:1",), ("tcp://h:2",)]
    with pytest.raises(ValueError, match="rank 0 is missing"):
        parse_remote(answered | {"remote_ranks": {"1": ["tcp://h:1"]}})
    with pytest.raises(ValueError, match="pp_size is 3, must divide the 2 ranks"):
        parse_remote(answered | {"pp_size": 3})


def test_decode_reads_each_head_once_and_tells_the_rank_nobody_reads() -> None:
    ranks = tuple(PrefillRank(f"e{rank}", rank, ("tcp://127.0.0.1:1",), "") for rank in range(4))
    engine = PrefillEngine(ranks)
    peers = read_peers(DecodeRank(0, 1, 2), engine, ("tcp",))
    found = [(read.peer.engine_id, read.consumers) for read in peers]
    assert found == [("e0", 1), ("e2", 1), ("e1", 0), ("e3", 0)]
    with pytest.raises(ValueError, match="3 here"):
        read_peers(DecodeRank(0, 3, 2), engine, ("tcp",))


def test_vllms_server_answers_its_router_sglang_and_both_decodes() -> None:
    server = BootstrapServer("127.0.0.1", 0, ENGINE)
    url = f"http://127.0.0.1:{server.port}"
    try:
        assert query_bootstrap(url, 5.0) == ENGINE
        router = get(f"{url}/query")["0"]
        assert router["engine_id"] == "e" and router["worker_addr"]["3"] == {"0": "tcp://127.0.0.1:4"}
        topology = get(
            f"{url}/route?prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1"
        )
        assert (topology["attn_tp_size"], topology["pp_size"], topology["dp_size"]) == (2, 2, 1)
        assert topology["page_size"] is None and topology["kv_cache_dtype"] is None
        assert get(f"{url}/health") == "OK"
        with pytest.raises(urllib.request.HTTPError):
            get(f"{url}/other")
    finally:
        server.close()


def test_silent_clients_hold_a_bounded_number_of_threads() -> None:
    server = BootstrapServer("127.0.0.1", 0, ENGINE)
    silent = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(MAX_ASKERS)]
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as refused:
            assert refused.recv(1) == b"", "closed without an answer"
        silent.pop().close()
        for _ in range(100):
            try:
                assert get(f"http://127.0.0.1:{server.port}/own/query")["0"]["engine_id"] == "e"
                break
            except OSError:  # its place is free when its thread saw that it left
                time.sleep(0.05)
        else:
            raise AssertionError("no place became free")
    finally:
        for one in silent:
            one.close()
        server.close()


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=5) as response:
        return json.loads(response.read())


@contextmanager
def answering(body: bytes) -> Iterator[str]:
    """A server that answers everything with ``body``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"<html>", "JSON"),
        (b"{}", "rank 0 is not among none"),
        (b'{"0": {"engine_id": "x"}}', "no field 'sage_kvt'"),
        (b'{"0": {"sage_kvt": {"ranks": []}}}', "must divide the 0 ranks"),
        (b'{"0": {"sage_kvt": {"ranks": [{"engine_id": 1}]}}}', "engine_id"),
        (b'{"0": {"sage_kvt": {"ranks": [], "metadata": "poem"}}}', "poem"),
        (b"[" * (2 << 20), "more than"),
        (b'{"0": {"x": ' + b"[" * 100_000, "recursion"),
    ],
)
def test_an_answer_that_is_not_ours_is_named(body: bytes, why: str) -> None:
    with answering(body) as url, pytest.raises(ValueError, match=why):
        query_bootstrap(url, 5.0)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
)
FIELDS = ["bootstrap_room", "bootstrap_host", "bootstrap_port", "remote_ranks", "remote_engine_id",
          "transfer_id", "pp_size", "remote_node", "in_room", "remote_bootstrap_addr",
          "remote_host", "remote_port", "remote_request_id"]  # fmt: skip


@given(st.dictionaries(st.sampled_from(FIELDS), json_values | st.integers(1, 9)))
def test_no_parameters_of_a_client_break_vllms_scheduler(params: dict[str, Any]) -> None:
    try:
        parse_remote(params)
    except ValueError as error:
        assert any(field in str(error) for field in FIELDS) or "ranks" in str(error)


class _Misleading(BaseHTTPRequestHandler):
    """Answers ``/query`` as its server's ``does`` says, and counts who came to ``/elsewhere``."""

    def do_GET(self) -> None:
        server: Any = self.server
        if self.path != "/query":
            server.elsewhere += 1
        if server.does == "redirect" and self.path == "/query":
            self.send_response(302)
            self.send_header("Location", "/elsewhere")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(100 if server.does == "drip" else 1):
                self.wfile.write(b"{")
                self.wfile.flush()
                time.sleep(0.05 if server.does == "drip" else 0)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def _misleading(does: str) -> Iterator[Any]:
    server: Any = HTTPServer(("127.0.0.1", 0), _Misleading)
    server.does, server.elsewhere = does, 0
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def test_nobody_sends_us_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with _misleading("redirect") as server, _misleading("answer") as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_port}")
        monkeypatch.delenv("no_proxy", raising=False)
        with pytest.raises(OSError, match="302"):
            query_bootstrap(f"http://127.0.0.1:{server.server_port}", 5.0)
        assert server.elsewhere == 0 and proxy.elsewhere == 0


def test_an_answer_that_never_ends_is_not_waited_for() -> None:
    with _misleading("drip") as server:
        begun = time.monotonic()
        with pytest.raises(OSError, match=r"took longer than 0\.3 s"):
            query_bootstrap(f"http://127.0.0.1:{server.server_port}", 0.3)
        assert time.monotonic() - begun < 3
