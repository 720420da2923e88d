# SPDX-License-Identifier: Apache-2.0
"""HiCache of unmodified SGLang with a store of ours, and a model whose answer depends on its context.

Runs in SGLang's own environment (``make test-sglang``), with the shims of ``cli/sglang_on_cpu``.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from integration_tests.cluster import wait_until
from integration_tests.recall import MODEL, recall_prompt
from integration_tests.tcp_proxy import TcpProxy
from sage_kv_connector.config import SECRET_ENV, KVTransportConfig
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.launch.process import core_halves, running
from sage_kv_connector.launch.sglang import SglangOptions, SglangProcess, sglang_server
from sage_kv_connector.launch.store import StoreProcess, store_process
from sage_kv_connector.store.client import StoreClient
from sage_kv_connector.store.messages import Stats
from sage_kv_connector.store.server import KVStore

pytestmark = pytest.mark.skipif(find_spec("sglang") is None, reason="runs in SGLang's environment")

PAGE = 16
COMMON = (
    "--dtype", "bfloat16", "--page-size", str(PAGE), "--enable-hierarchical-cache", "--hicache-ratio", "2",
    "--hicache-io-backend", "direct", "--hicache-write-policy", "write_through",
    "--hicache-storage-prefetch-policy", "wait_complete", "--hicache-storage-backend", "dynamic",
)  # fmt: skip


class Answer(NamedTuple):
    """``stored``: prompt tokens whose KV came from the store; ``seconds``: the whole request."""

    token_ids: list[int]
    stored: int
    seconds: float


class Servers(NamedTuple):
    """``near`` reaches the store over shm, ``far`` over tcp through ``proxy``."""

    store: StoreProcess
    client: StoreClient
    near: SglangProcess
    far: SglangProcess
    proxy: TcpProxy
    options: SglangOptions
    secret: dict[str, str]


def hicache(address: str, layout: str = "page_first_direct") -> tuple[str, ...]:
    extra = {
        "backend_name": "sage_kvt",
        "module_path": "sage_kv_connector.integrations.sglang.hicache",
        "class_name": "SageKVHiCache",
        "interface_v1": 1,
        "prefetch_threshold": PAGE,
        "address": [address],
    }
    return ("--hicache-mem-layout", layout, "--hicache-storage-backend-extra-config", json.dumps(extra))


@pytest.fixture(scope="module")
def servers(scratch: Path, secret: dict[str, str]) -> Iterator[Servers]:
    port = free_port()
    options = SglangOptions(MODEL, scratch, 2048, 4096, COMMON, secret)
    proxy = TcpProxy(port)
    config = KVTransportConfig.load({"backend": "tcp", "host": "127.0.0.1", "secret": secret[SECRET_ENV]})
    known = (f"advertise_port={proxy.port}",)
    with store_process("256MiB", port=port, options=known, env=secret) as store:
        address = f"tcp://127.0.0.1:{port}"
        client = StoreClient([address], config)
        first, second = core_halves()
        near = sglang_server("hicache-near", options, None, first, extra=hicache(address))
        far = sglang_server(
            "hicache-far", options, None, second,
            transport={"backend": "tcp"}, extra=hicache(f"tcp://127.0.0.1:{proxy.port}"),
        )  # fmt: skip
        with running(near, far):
            yield Servers(store, client, near, far, proxy, options, secret)
        client.close()
    proxy.close()


def post(url: str, path: str, body: dict[str, Any] | None = None) -> bytes:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=90)
    try:
        connection.request("POST", path, json.dumps(body or {}), {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        assert response.status == 200, text
        return text
    finally:
        connection.close()


def ask(server: SglangProcess, prompt: list[int]) -> Answer:
    begun = time.monotonic()
    sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    answer = json.loads(post(server.url, "/generate", {"input_ids": prompt, "sampling_params": sampling}))
    details = answer["meta_info"].get("cached_tokens_details") or {}
    return Answer(answer["output_ids"], details.get("storage", 0), time.monotonic() - begun)


def counters(client: StoreClient) -> Stats:
    stats = client.stats()
    assert stats is not None
    return stats


def put_entries(servers: Servers, more_than: int) -> None:
    """Writing through to the store goes on after the answer."""
    wait_until(
        lambda: counters(servers.client).put_entries >= more_than, 20.0, lambda: f"{counters(servers.client)}"
    )


def forget(server: SglangProcess) -> None:
    """Empty the server's own caches, on the device and in its host pool; it refuses while it still writes."""

    def emptied() -> bool:
        with contextlib.suppress(AssertionError):
            post(server.url, "/flush_cache")
            return True
        return False

    wait_until(emptied, 20.0, lambda: "the server did not become idle")


@pytest.mark.parametrize("tokens", [331, 700, 1024])
def test_another_server_takes_the_kv_from_the_store(servers: Servers, tokens: int) -> None:
    prompt, expected = recall_prompt(tokens, tokens)
    whole = (tokens - 1) // PAGE
    before = counters(servers.client)
    first = ask(servers.near, prompt)
    assert (first.token_ids, first.stored) == (expected, 0)
    put_entries(servers, before.put_entries + whole)
    between = counters(servers.client)
    second = ask(servers.far, prompt)
    assert (second.token_ids, second.stored) == (expected, whole * PAGE)
    after = counters(servers.client)
    page_bytes = (between.put_bytes - before.put_bytes) // (between.put_entries - before.put_entries)
    assert page_bytes > 0 and after.got_bytes - between.got_bytes >= whole * page_bytes
    assert after.failed_transfers == before.failed_transfers


def test_a_server_that_forgot_takes_it_back(servers: Servers) -> None:
    prompt, expected = recall_prompt(11, 500)
    before = counters(servers.client).put_entries
    assert ask(servers.near, prompt)[:2] == (expected, 0)
    put_entries(servers, before + 31)
    forget(servers.near)
    assert ask(servers.near, prompt)[:2] == (expected, 31 * PAGE)


def test_a_longer_prompt_takes_its_beginning(servers: Servers) -> None:
    """Another question about the same document: what is stored is a prefix, the rest is computed."""
    document, _ = recall_prompt(12, 600)
    other, expected = recall_prompt(12, 600, questions=3)
    assert other == document
    before = counters(servers.client).put_entries
    assert ask(servers.near, document[:400]).stored == 0
    put_entries(servers, before + 25)
    forget(servers.near)
    answer = ask(servers.near, other)
    assert answer.token_ids == expected and answer.stored == 400


def test_a_flipped_byte_is_a_miss_and_the_answer_is_right(servers: Servers) -> None:
    prompt, expected = recall_prompt(13, 1024)
    before = counters(servers.client).put_entries
    ask(servers.near, prompt)
    put_entries(servers, before + 63)
    servers.proxy.flip_byte_at(500_000)
    answer = ask(servers.far, prompt)
    assert servers.proxy.flipped, "its KV went by"
    assert answer.token_ids == expected and answer.stored == 0
    assert "forged" in servers.far.log.read_text()


def test_another_layout_and_tp_size_do_not_share_and_work_as_well(servers: Servers) -> None:
    prompt, expected = recall_prompt(14, 500)
    before = counters(servers.client).put_entries
    ask(servers.near, prompt)
    put_entries(servers, before + 31)
    layers = sglang_server(
        "hicache-layers-tp2", servers.options, tp_size=2,
        extra=hicache(f"tcp://127.0.0.1:{servers.proxy.target_port}", "layer_first"),
    )  # fmt: skip
    with running(layers):
        before = counters(servers.client).put_entries
        assert ask(layers, prompt)[:2] == (expected, 0)
        put_entries(servers, before + 2 * 31)  # each rank its own heads
        forget(layers)
        assert ask(layers, prompt)[:2] == (expected, 31 * PAGE)


def test_a_store_that_dies_costs_no_request_and_another_one_serves(servers: Servers) -> None:
    """The last test: it ends the store."""
    prompt, expected = recall_prompt(15, 700)
    servers.store.popen.send_signal(signal.SIGKILL)
    servers.store.popen.wait(10)
    for server in (servers.near, servers.far):
        answer = ask(server, prompt)
        assert answer.token_ids == expected and answer.stored == 0
        assert answer.seconds < 20
        assert "is left alone for" in server.log.read_text()
    ports = {"port": servers.proxy.target_port, "advertise_port": servers.proxy.port}
    config = KVTransportConfig.load({"host": "127.0.0.1", **ports, "secret": servers.secret[SECRET_ENV]})
    another = KVStore(64 << 20, config)
    another.start()
    try:
        seeds = iter(range(100, 200))

        def kept_again() -> bool:
            some, right = recall_prompt(next(seeds), 400)
            assert ask(servers.near, some).token_ids == right
            return another.stats().put_entries >= 24

        wait_until(kept_again, 60.0, lambda: f"{another.stats()}")
        # That the answers above came from the store's bytes: with other bytes there they are other answers.
        prompt, expected = recall_prompt(16, 700)
        before = another.stats().put_entries
        assert ask(servers.near, prompt)[:2] == (expected, 0)
        wait_until(lambda: another.stats().put_entries >= before + 43, 20.0)
        another._memory[:] = 0
        forget(servers.near)
        answer = ask(servers.near, prompt)
        assert answer.stored == 43 * PAGE and answer.token_ids != expected
    finally:
        another.close()
