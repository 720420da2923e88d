# SPDX-License-Identifier: Apache-2.0
"""Unmodified SGLang servers and router, with a model whose answer depends on its context.

Runs in SGLang's own environment (``make test-sglang``).
"""

from __future__ import annotations

import json
import signal
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from integration_tests.cluster import wait_until
from integration_tests.fault_sglang import say_version
from integration_tests.recall import MODEL, recall_prompt
from integration_tests.tcp_proxy import TcpProxy
from integration_tests.telemetry_pair import METRICS, WatchedPair, exporter_of
from integration_tests.telemetry_phases import CHECKS, PAIR, Verdict, run_phase
from integration_tests.telemetry_sglang import SglangLoad, settle
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.launch.process import Process, ServerError, core_halves, running
from sage_kv_connector.launch.sglang import (
    DECODE,
    PREFILL,
    SglangOptions,
    SglangProcess,
    generate,
    generate_on_pair,
    room_at,
    sglang_router,
    sglang_server,
)
from sage_kv_connector.telemetry.recording.publishing import directory

pytestmark = pytest.mark.skipif(find_spec("sglang") is None, reason="runs in SGLang's environment")

#: Short, so that what hangs on them is seen.
TIMES = {"lease_s": 8, "deadline_s": 20, "peer_timeout_s": 15, "unmatched_timeout_s": 8}
COMMON = ("--dtype", "bfloat16", "--chunked-prefill-size", "256", "--enable-metrics")
#: Of K and V of a token in the model's three layers, bf16.
TOKEN_BYTES = 2 * 2 * 3 * 2 * 64
NO_PREFIX_CACHE = "--disable-radix-cache"


class Servers(NamedTuple):
    prefill: SglangProcess
    decode: SglangProcess
    decode_tcp: SglangProcess
    router: Process
    proxy: TcpProxy
    audit: Path
    options: SglangOptions


def test_a_bad_option_is_the_last_word_of_a_server_that_loads_nothing(scratch: Path) -> None:
    options = SglangOptions(MODEL, scratch, 2048, 16384, COMMON)
    server = sglang_server("sglang-refused", options, PREFILL, transport={"backend": "rdmaa"})
    with pytest.raises(ServerError), running(server):
        pass
    log = server.log.read_text()
    last = "sage_kvt: backend is 'rdmaa' (from $SAGE_KVT_CONFIG); allowed: auto, "
    assert log.splitlines()[-1].startswith(last) and "server_args=" not in log


@pytest.fixture(scope="module")
def servers(scratch: Path, secret: dict[str, str]) -> Iterator[Servers]:
    audit = scratch / "audit-sglang.jsonl"
    audit.touch()
    port = free_port()
    proxy = TcpProxy(port)
    options = SglangOptions(MODEL, scratch, 2048, 16384, COMMON, secret)
    common = {"audit_file": audit, "security": "none", **TIMES}  # a CRC is to be seen
    first, second = core_halves()
    prefill = sglang_server(
        "sglang-prefill", options, PREFILL, first,
        transport={**common, "port": port, "advertise_port": proxy.port},
        extra=("--page-size", "16", NO_PREFIX_CACHE),
    )  # fmt: skip
    decode = sglang_server(
        "sglang-decode", options, DECODE, second, transport=common,
        extra=("--page-size", "16", "--disaggregation-decode-enable-radix-cache"),
    )  # fmt: skip
    # Another page size and kv heads over two ranks: every page is converted on its way.
    decode_tcp = sglang_server(
        "sglang-decode-tcp-tp2", options, DECODE, second,
        transport={**common, "backend": "tcp"}, tp_size=2, extra=("--page-size", "32", NO_PREFIX_CACHE),
    )  # fmt: skip
    router = sglang_router(prefill, decode, scratch)
    with running(prefill, decode, decode_tcp), running(router):
        yield Servers(prefill, decode, decode_tcp, router, proxy, audit, options)
    proxy.close()


def audited(servers: Servers, records: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    def all_there() -> bool:
        found[:] = [json.loads(line) for line in servers.audit.read_text().splitlines()]
        return len(found) >= records

    wait_until(all_there, 10.0, lambda: f"{len(found)} audit records of {records}")
    servers.audit.write_text("")
    return found


@pytest.mark.parametrize("tokens", [96, 331, 700, 1024])
def test_the_router_hands_over_what_one_server_would_have_said(servers: Servers, tokens: int) -> None:
    prompt, expected = recall_prompt(tokens, tokens)
    assert generate(servers.router.url, prompt, max_tokens=8).token_ids == expected
    records = audited(servers, 2)
    assert {r["side"] for r in records} == {"producer", "consumer"}
    assert records[0]["sha256"] == records[1]["sha256"]
    assert {r["backend"] for r in records} == {"shm"} and records[0]["nbytes"] > 0


def test_decode_asks_only_for_what_its_prefix_cache_lacks(servers: Servers) -> None:
    prompt, expected = recall_prompt(4, 800)
    assert generate(servers.router.url, prompt, max_tokens=8).token_ids == expected
    whole = audited(servers, 2)[0]["nbytes"]
    assert generate(servers.router.url, prompt, max_tokens=8).token_ids == expected
    assert not audited(servers, 0), "decode has every page already"
    assert "Prefill transfer failed" not in servers.prefill.log.read_text()
    other = prompt[:512] + recall_prompt(5, 300)[0]
    answer = generate(servers.router.url, other, max_tokens=8).token_ids
    records = audited(servers, 2)
    assert records[0]["sha256"] == records[1]["sha256"] and 0 < records[0]["nbytes"] < whole / 2
    assert answer == generate_on_pair(servers.prefill, servers.decode_tcp, other, max_tokens=8).token_ids
    audited(servers, 3)


@pytest.mark.parametrize("tokens", [90, 331, 1024])
def test_another_page_size_and_tp_size_over_tcp(servers: Servers, tokens: int) -> None:
    prompt, expected = recall_prompt(tokens, tokens)
    answer = generate_on_pair(servers.prefill, servers.decode_tcp, prompt, max_tokens=8)
    assert answer.token_ids == expected
    records = audited(servers, 3)
    assert {(r["side"], r["rank"]) for r in records} == {("producer", 0), ("consumer", 0), ("consumer", 1)}
    assert all(r["checksum"] and r["backend"] == "tcp" for r in records)


@pytest.mark.parametrize("n", [2, 5])
def test_samples_of_one_prompt_are_all_handed_over(servers: Servers, n: int) -> None:
    """SGLang sends them all to one bootstrap room."""
    prompt, expected = recall_prompt(60 + n, 500)
    sampling = {"n": n, "temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    body = json.dumps({"input_ids": prompt, "sampling_params": sampling}).encode()
    asked = urllib.request.Request(
        f"{servers.router.url}/generate", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=60) as response:
        answers = json.loads(response.read())
    assert [answer["output_ids"] for answer in answers] == [expected] * n
    next_prompt, next_expected = recall_prompt(70 + n, 300)
    assert generate(servers.router.url, next_prompt, max_tokens=8).token_ids == next_expected
    servers.audit.write_text("")


def test_many_at_once(servers: Servers) -> None:
    prompts = [recall_prompt(seed, 200 + 50 * seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda p: generate(servers.router.url, p[0], max_tokens=8), prompts))
    assert [answer.token_ids for answer in answers] == [expected for _, expected in prompts]
    records = audited(servers, 16)
    assert len({r["sha256"] for r in records}) == 8


def test_one_flipped_byte_is_caught(servers: Servers) -> None:
    prompt, expected = recall_prompt(5, 1024)
    servers.proxy.flip_byte_at(200_000)
    # The rank that answers may have had whole pages itself.
    with pytest.raises(ServerError, match=r"checksum_mismatch|from another rank"):
        generate_on_pair(servers.prefill, servers.decode_tcp, prompt, max_tokens=8)
    assert servers.proxy.flipped and "checksum_mismatch" in servers.decode_tcp.log.read_text()
    assert generate_on_pair(servers.prefill, servers.decode_tcp, prompt, max_tokens=8).token_ids == expected


def test_an_aborted_request_leaves_nothing(servers: Servers) -> None:
    prompt, expected = recall_prompt(6, 1024)
    bootstrap = {
        "bootstrap_host": "127.0.0.1",
        "bootstrap_port": servers.prefill.bootstrap_port,
        "bootstrap_room": 77,
    }
    with pytest.raises(ServerError):  # prefill never hears of it, and the client gives up
        generate(servers.decode.url, prompt, max_tokens=8, bootstrap=bootstrap, timeout_s=2.0)
    assert generate(servers.router.url, prompt, max_tokens=8).token_ids == expected


def test_a_prefill_that_never_comes_is_a_failed_request(servers: Servers) -> None:
    prompt, _ = recall_prompt(7, 300)
    bootstrap = {
        "bootstrap_host": "127.0.0.1",
        "bootstrap_port": servers.prefill.bootstrap_port,
        "bootstrap_room": 78,
    }
    begun = time.monotonic()
    with pytest.raises(ServerError, match="no prefill"):
        generate(servers.decode.url, prompt, max_tokens=8, bootstrap=bootstrap, timeout_s=30.0)
    assert time.monotonic() - begun < 15


def test_kv_of_other_weights_is_refused_until_both_servers_have_them(servers: Servers) -> None:
    prompt, expected = recall_prompt(9, 300)
    say_version(servers.prefill, "7")
    with pytest.raises(ServerError, match=r"weights: .* here, .*, version 7 at the peer"):
        generate_on_pair(servers.prefill, servers.decode, prompt, max_tokens=8)
    say_version(servers.decode, "7")
    assert generate_on_pair(servers.prefill, servers.decode, prompt, max_tokens=8).token_ids == expected
    room = room_at(servers.prefill.bootstrap_port)
    with ThreadPoolExecutor(1) as pool:
        computed = pool.submit(generate, servers.prefill.url, prompt, max_tokens=8, bootstrap=room)
        time.sleep(2)
        for server in (servers.prefill, servers.decode):
            say_version(server, "default")
        with pytest.raises(ServerError, match="the weights were replaced"):
            generate(servers.decode.url, prompt, max_tokens=8, bootstrap=room)
        assert isinstance(computed.exception(), ServerError)
    assert generate_on_pair(servers.prefill, servers.decode, prompt, max_tokens=8).token_ids == expected


def test_metrics_say_what_was_sent_and_what_failed(servers: Servers, scratch: Path) -> None:
    exporter = exporter_of(directory(), scratch)
    verdict = Verdict("sglang")
    with running(exporter):
        pair = WatchedPair(servers.prefill, servers.decode, exporter, servers.proxy, settle, "none")
        load = SglangLoad(pair, servers.prefill.bootstrap_port, TOKEN_BYTES)
        run_phase(load, verdict, PAIR, ("weights", "secret"))
        shown = pair.read()["decode", METRICS]
    assert verdict.wrong == {check: [] for check in CHECKS}
    assert {row["bytes"]["transfers"] for row in verdict.rows} == {26, 2}, "something was sent"
    families = {series.metric for series, value in shown.ours() if value}
    assert {"transfers_total", "stage_seconds", "failed_loads_total", "sessions", "chunks_total"} <= families
    assert all("tp_rank" in dict(series.labels) for series, _ in shown.ours())
    servers.audit.write_text("")


def test_a_dead_prefill_ends_its_requests_and_another_one_serves(servers: Servers) -> None:
    """The last test: it ends the prefill server."""
    prompt, _ = recall_prompt(8, 1024)
    servers.proxy.hold_at(100_000)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(generate_on_pair, servers.prefill, servers.decode_tcp, prompt, timeout_s=40.0)
        assert servers.proxy.held.wait(20)
        begun = time.monotonic()
        servers.prefill.stop(signal.SIGKILL)
        servers.proxy.cut()
        # The rank that answers may hear of it from the other one first.
        with pytest.raises(ServerError, match=r"lost|from another rank"):
            asked.result(30)
        assert time.monotonic() - begun < 10
    # With another page size and dtype: every element is converted.
    again = sglang_server(
        "sglang-prefill-again", servers.options, PREFILL, core_halves()[0],
        transport={"audit_file": servers.audit, "security": "none", **TIMES},
        extra=("--page-size", "64", "--dtype", "float16", NO_PREFIX_CACHE),
    )  # fmt: skip
    with running(again):
        for decode in (servers.decode, servers.decode_tcp):
            prompt, expected = recall_prompt(9, 500)
            assert generate_on_pair(again, decode, prompt, max_tokens=8).token_ids == expected
