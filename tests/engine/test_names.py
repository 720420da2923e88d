# SPDX-License-Identifier: Apache-2.0
"""A peer's host name is looked up where nothing else waits for it."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from sage_kv_connector.contract.failure import Code, Reason
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.engine.control.loop import ControlLoop
from sage_kv_connector.engine.control.names import MAX_AT_ONCE, MAX_WAITING, Names, has_name
from sage_kv_connector.engine.core import EngineCore
from sage_kv_connector.engine.pages.memory import MemorySource
from sage_kv_connector.engine.pages.target import MemoryTarget
from sage_kv_connector.engine.transfer.subscription import Wanted
from tests.engine.conftest import Cores, made_cores

PATIENCE_S = 10.0
real_getaddrinfo = socket.getaddrinfo


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A resolver that does not answer for names that begin with ``stuck`` until the test ends."""
    over = threading.Event()

    def getaddrinfo(host: str, *arguments: Any, **named: Any) -> Any:
        if host.startswith("stuck"):
            over.wait(PATIENCE_S)
            raise socket.gaierror("timed out")
        return real_getaddrinfo(host, *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield over
    over.set()


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("tcp://10.0.0.1:5", False),
        ("tcp://[::1]:5", False),
        ("tcp://[fe80::1%eth0]:5", False),
        ("tcp://decode-0.svc:5", True),
        ("tcp://localhost:5", True),
        ("tcp://:5", False),
        ("shm://", False),
    ],
)
def test_names_are_told_from_numbers(address: str, named: bool) -> None:
    assert has_name(address) == named


def test_a_name_that_is_not_answered_holds_up_nobody(stuck: threading.Event) -> None:
    loop = ControlLoop()
    names = Names(loop)
    found: list[Any] = []
    loop.start()
    try:
        begun = time.monotonic()
        for number in range(MAX_AT_ONCE):
            loop.call(PATIENCE_S, names.look_up, f"tcp://stuck{number}.example:5", 0.3, found.append)
        loop.call(PATIENCE_S, names.look_up, "tcp://localhost:5", 0.3, found.append)  # behind them
        assert time.monotonic() - begun < 0.25 and not found, "the control thread goes on meanwhile"
        while len(found) < MAX_AT_ONCE + 1 and time.monotonic() - begun < PATIENCE_S:
            time.sleep(0.01)
        assert all(isinstance(one, Reason) and "within 0.3 s" in one.detail for one in found), found
        stuck.set()
        answered: list[Any] = []
        loop.call(PATIENCE_S, names.look_up, "tcp://localhost:5", PATIENCE_S, answered.append)
        while not answered and time.monotonic() - begun < PATIENCE_S:
            time.sleep(0.01)
        assert "tcp://127.0.0.1:5" in answered[0]
    finally:
        stuck.set()
        loop.stop()


def test_names_that_wait_are_bounded(stuck: threading.Event) -> None:
    loop = ControlLoop()
    names: Names = Names(loop)
    found: list[Any] = []
    for number in range(MAX_AT_ONCE + MAX_WAITING + 1):
        names.look_up(f"tcp://stuck{number}.example:5", 60, found.append)
    assert len(found) == 1 and "wait to be resolved" in found[0].detail


@pytest.fixture
def make_tcp_core() -> Iterator[Cores]:
    yield from made_cores(backend="tcp", host="127.0.0.1", connect_timeout_s=1.0)


def test_a_session_is_opened_by_name_whichever_of_its_addresses_answers(
    make_tcp_core: Cores, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = make_tcp_core(), make_tcp_core()
    port = int(prefill.addresses[0].rpartition(":")[2])

    def getaddrinfo(host: str, *arguments: Any, **named: Any) -> Any:
        assert host == "prefill.example"
        return [(0, 0, 0, "", (address, port)) for address in ("127.0.0.9", "127.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert _outcome_code(decode, prefill, f"tcp://prefill.example:{port}") is None


@pytest.mark.parametrize("host", ["192.0.2.7", "[2001:db8::7]", "anywhere.example"])
def test_without_a_secret_nobody_beyond_this_node_is_dialled(
    make_tcp_core: Cores, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """Whatever a request names, and whatever its name stands for."""
    prefill, decode = make_tcp_core(), make_tcp_core()
    dialled = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("192.0.2.7", 5))])
    monkeypatch.setattr(decode.backends["tcp"], "connect", lambda *found: dialled.append(found))
    assert _outcome_code(decode, prefill, f"tcp://{host}:5") is Code.BAD_SECRET
    assert dialled == []


def test_a_name_that_nobody_knows_is_an_unreachable_peer(make_tcp_core: Cores) -> None:
    prefill, decode = make_tcp_core(), make_tcp_core()
    assert _outcome_code(decode, prefill, "tcp://nobody.invalid:5") is Code.UNREACHABLE


def _outcome_code(decode: EngineCore, prefill: EngineCore, address: str) -> Code | None:
    """What ends a transfer of some plain memory from ``address``, None if it arrived."""
    outcomes: queue.Queue[Outcome] = queue.Queue()
    memory = [np.full(4096, value, np.uint8) for value in (7, 0)]
    segments = [np.array([[one.ctypes.data, one.nbytes]], dtype=np.uint64) for one in memory]
    for core, one in zip((prefill, decode), memory, strict=True):
        core.register_host_memory(one.ctypes.data, one.nbytes)
    prefill.offer("t", MemorySource(segments[0]), lambda _: None)
    wanted = Wanted("t", MemoryTarget(segments[1]), finished=False, deadline_s=PATIENCE_S)
    decode.subscribe(PeerAddress(prefill.engine_id, 0, (address,)), wanted, outcomes.put)
    outcome = outcomes.get(timeout=PATIENCE_S)
    assert outcome.ok == bool((memory[1] == 7).all())
    return outcome.failure.code if outcome.failure else None
