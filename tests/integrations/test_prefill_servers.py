# SPDX-License-Identifier: Apache-2.0
"""What SGLang's scheduler waits for when a client names a prefill server: never for one that is silent."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import TypeVar

import pytest

from sage_kv_connector.contract.failure import Code, Reason
from sage_kv_connector.integrations.common.prefill_ranks import PrefillEngine, PrefillRank
from sage_kv_connector.integrations.sglang import prefill_servers
from sage_kv_connector.integrations.sglang.prefill_servers import PrefillServers

T = TypeVar("T")
ENGINE = PrefillEngine((PrefillRank("e", 0, ("tcp://127.0.0.1:1",), "n"),))


class Network:
    """Servers by address; what is not there is silent until the test ends."""

    def __init__(self) -> None:
        self.engines: dict[str, dict[int, PrefillEngine] | Exception] = {}
        self.routes: dict[str, bool | Exception] = {}
        self.asked: list[str] = []
        self.over = threading.Event()

    def query_engines(self, url: str, timeout_s: float) -> dict[int, PrefillEngine]:
        address = url.removeprefix("http://")
        self.asked.append(address)
        if address not in self.engines:
            self.over.wait(5)
            raise TimeoutError("timed out")
        return given(self.engines[address])

    def route(self, address: str) -> bool:
        return given(self.routes.get(address, True))


def given(answer: T | Exception) -> T:
    if isinstance(answer, Exception):
        raise answer
    return answer


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    made = Network()
    monkeypatch.setattr(prefill_servers, "query_engines", made.query_engines)
    monkeypatch.setattr(prefill_servers, "NEW_S", 0.5)
    yield made
    made.over.set()


@pytest.fixture
def servers(network: Network) -> PrefillServers:
    return PrefillServers(network.route, 1.0)


def test_one_that_answers_is_known_at_once(network: Network, servers: PrefillServers) -> None:
    network.engines["a:1"] = {0: ENGINE}
    servers.ask("a:1", 5.0)
    assert servers.find("a:1", 0) == ENGINE
    found = servers.find("a:1", 3)
    assert isinstance(found, Reason) and "rank 3 is not among 0" in found.detail
    assert network.asked == ["a:1"]


def test_silent_ones_hold_up_nobody(network: Network, servers: PrefillServers) -> None:
    network.engines["good:1"] = {0: ENGINE}
    begun = time.monotonic()
    servers.ask("silent:0", 0.05)
    # However many there are and however often they are asked: who waits for one does not wait for the next.
    for i in range(60):
        servers.ask(f"silent:{i % 20}", 1.0)
    assert time.monotonic() - begun < 1
    servers.ask("good:1")
    until = time.monotonic() + 5
    while isinstance(servers.find("good:1", 0), Reason):
        assert time.monotonic() < until
    found = servers.find("silent:0", 0)
    assert isinstance(found, Reason) and found.code is Code.BOOTSTRAP


@pytest.mark.parametrize(
    "answer", [RuntimeError("Page size mismatch"), TypeError("page_size: [1]"), False, RecursionError()]
)
def test_no_answer_of_a_server_ends_the_scheduler(
    network: Network, servers: PrefillServers, answer: bool | Exception
) -> None:
    network.engines["a:1"], network.routes["a:1"] = {0: ENGINE}, answer
    servers.ask("a:1", 5.0)
    assert isinstance(servers.find("a:1", 0), Reason)


def test_who_is_not_ours_is_told_so(network: Network, servers: PrefillServers) -> None:
    network.engines["a:1"] = ValueError("it has no field 'sage_kvt'")
    servers.ask("a:1", 5.0)
    found = servers.find("a:1", 0)
    assert isinstance(found, Reason) and "on both sides" in found.detail and "no field" in found.detail


def test_one_that_was_forgotten_is_asked_again(network: Network, servers: PrefillServers) -> None:
    network.engines["a:1"] = {0: ENGINE}
    servers.ask("a:1", 5.0)
    restarted = PrefillEngine((PrefillRank("f", 0, ("tcp://127.0.0.1:2",), "n"),))
    network.engines["a:1"] = {0: restarted}
    assert servers.find("a:1", 0) == ENGINE
    servers.forget("a:1")
    assert servers.find("a:1", 0) == restarted


def test_what_clients_name_fills_no_memory(
    network: Network, servers: PrefillServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill_servers, "MAX_SERVERS", 4)
    for i in range(16):
        network.engines[f"a:{i}"] = {0: ENGINE}
        servers.ask(f"a:{i}", 5.0)
    assert len(servers._known) == 4 and servers.find("a:15", 0) == ENGINE
