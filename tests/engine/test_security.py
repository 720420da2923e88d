# SPDX-License-Identifier: Apache-2.0
"""Engines over real sockets: who is let in, who is not, and what is said and counted of them."""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from sage_kv_connector.backends.tcp.backend import TcpBackend
from sage_kv_connector.contract.failure import Code, Reason
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.engine.core import EngineCore
from sage_kv_connector.engine.pages.memory import MemorySource
from sage_kv_connector.engine.pages.target import MemoryTarget
from sage_kv_connector.engine.session.refusals import Refusals
from sage_kv_connector.engine.transfer.subscription import Wanted
from sage_kv_connector.telemetry.recording.flood import QUIET_S, Flood
from tests.backends.tcp.wire import MESSAGE, PREFACE, Proxy, header, parse_address
from tests.engine.conftest import Cores, made_cores

PATIENCE_S = 10.0
Change = Callable[[int, bytes], bytes]
SECRET = "a secret of servers"
IDLE = 64


@pytest.fixture
def make() -> Iterator[Cores]:
    yield from made_cores(backend="tcp", host="127.0.0.1", secret=SECRET, connect_timeout_s=5.0)


@pytest.fixture
def make_proxy() -> Iterator[Callable[..., Proxy]]:
    made: list[Proxy] = []

    def make(target: str, *changes: Change) -> Proxy:
        made.append(Proxy(target, *(changes or (as_it_is,))))
        return made[-1]

    yield make
    for one in made:
        one.close()


def as_it_is(_: int, data: bytes) -> bytes:
    return data


def fetch(decode: EngineCore, prefill: EngineCore, address: str = "", size: int = 1 << 20) -> Outcome:
    """Some memory of prefill's, at ``address``."""
    outcomes: queue.Queue[Outcome] = queue.Queue()
    memory = [np.full(size, value, np.uint8) for value in (7, 0)]
    segments = [np.array([[one.ctypes.data, one.nbytes]], dtype=np.uint64) for one in memory]
    for core, one in zip((prefill, decode), memory, strict=True):
        core.register_host_memory(one.ctypes.data, one.nbytes)
    name = f"t{time.monotonic_ns()}"
    prefill.offer(name, MemorySource(segments[0]), lambda _: None)
    wanted = Wanted(name, MemoryTarget(segments[1]), finished=False, deadline_s=PATIENCE_S)
    peer = PeerAddress(prefill.engine_id, 0, (address or prefill.addresses[0],))
    decode.subscribe(peer, wanted, outcomes.put)
    outcome = outcomes.get(timeout=2 * PATIENCE_S)
    assert outcome.ok == bool((memory[1] == 7).all())
    return outcome


def code_of(outcome: Outcome) -> Code | None:
    return outcome.failure.code if outcome.failure else None


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def refused(core: EngineCore, code: str) -> Callable[[], bool]:
    return lambda: core.sessions.refusals.by_code[code] > 0


# -- levels


@pytest.mark.parametrize("security", ["none", "authenticated", "encrypted"])
@pytest.mark.parametrize("links", ["", "127.0.0.1+127.0.0.2"])
def test_equal_levels_hand_over(make: Cores, security: str, links: str) -> None:
    prefill, decode = make({"security": security, "links": links}), make({"security": security})
    stats = fetch(decode, prefill, size=16 << 20).stats
    assert stats is not None and stats.security == security
    (session,) = decode.sessions
    lanes = 2 if links else 1
    wait_until(lambda: session.backend.connection_info(session.connection).lanes >= lanes)
    assert prefill.counters()["forged_frames"] == decode.counters()["forged_frames"] == 0


@pytest.mark.parametrize("decodes", ["none", "encrypted"])
def test_another_level_is_refused_with_both_values(make: Cores, decodes: str) -> None:
    prefill, decode = make({}), make({"security": decodes})
    outcome = fetch(decode, prefill)
    assert code_of(outcome) is Code.SECURITY
    assert f"security: authenticated here, {decodes} at the peer" in str(outcome.failure)
    wait_until(refused(prefill, "security"))


def test_what_needs_a_secret_or_libcrypto_does_not_start_without(
    make: Cores, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="security is 'encrypted', which needs a shared secret"):
        make({"secret": None, "security": "encrypted"})
    monkeypatch.setattr(TcpBackend, "protection_lacks", lambda _: "libcrypto.so.3 was not found")
    with pytest.raises(ValueError, match="security is 'authenticated', which tcp can't keep here: libcrypto"):
        make({})
    make({"security": "none"})


# -- secrets


def test_a_secret_is_changed_server_by_server(make: Cores) -> None:
    """Old alone, then new and old, then new alone; whoever is one step ahead or behind is let in."""
    steps = [
        {"secret": "old"},
        {"secret": "new", "previous_secret": "old"},
        {"secret": "new"},
    ]
    for ahead, behind in ((0, 1), (1, 0), (1, 1), (1, 2), (2, 1)):
        assert code_of(fetch(make(steps[ahead]), make(steps[behind]))) is None
    assert code_of(fetch(make(steps[0]), make(steps[2]))) is Code.BAD_SECRET


def test_another_secret_is_counted_and_logged_with_the_address(
    make: Cores, caplog: pytest.LogCaptureFixture
) -> None:
    prefill, stranger = make({}), make({"secret": "a guess"})
    assert code_of(fetch(stranger, prefill)) is Code.BAD_SECRET
    wait_until(refused(prefill, "bad_secret"))
    wait_until(lambda: "refused 127.0.0.1:" in caplog.text)  # it is counted first
    assert "a guess" not in caplog.text


# -- in between


def test_a_relay_is_refused_and_one_that_is_known_is_not(
    make: Cores, make_proxy: Callable[..., Proxy]
) -> None:
    prefill, decode = make({}), make({})
    relay = make_proxy(prefill.addresses[0])
    outcome = fetch(decode, prefill, relay.address)
    assert code_of(outcome) is Code.RELAYED and relay.address in str(outcome.failure)
    wait_until(refused(prefill, "relayed"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    known = make_proxy(f"tcp://127.0.0.1:{port}")
    behind = make({"port": port, "advertise_port": parse_address(known.address)[1]})
    assert behind.addresses == (known.address,)
    assert code_of(fetch(decode, behind)) is None


@pytest.mark.parametrize(("times", "code"), [(1, None), (2, Code.UNREACHABLE)])
def test_a_connection_that_breaks_in_the_handshake_is_dialled_once_more(
    make: Cores, make_proxy: Callable[..., Proxy], times: int, code: Code | None
) -> None:
    left = [OSError("broken")] * times

    def breaks(position: int, data: bytes) -> bytes:
        if left and position == 0:
            raise left.pop()
        return data

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    front = make_proxy(f"tcp://127.0.0.1:{port}", breaks)
    prefill = make({"port": port, "advertise_port": parse_address(front.address)[1]})
    assert code_of(fetch(make({}), prefill)) is code and not left


@pytest.mark.parametrize("security", ["authenticated", "encrypted"])
def test_a_changed_byte_on_the_way_ends_the_session_and_the_next_one_is_right(
    make: Cores, make_proxy: Callable[..., Proxy], security: str, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    harm = [True]

    def change(position: int, data: bytes) -> bytes:
        if harm and position + len(data) > 300_000:
            harm.clear()
            return data[:-1] + bytes([data[-1] ^ 1])
        return data

    proxy = make_proxy(f"tcp://127.0.0.1:{port}", as_it_is, change)
    prefill = make({"port": port, "advertise_port": parse_address(proxy.address)[1], "security": security})
    decode = make({"security": security})
    outcome = fetch(decode, prefill)
    assert code_of(outcome) in (Code.FORGED, Code.SESSION_LOST) and not harm
    wait_until(lambda: decode.counters()["forged_frames"] == 1)
    wait_until(lambda: f"at {proxy.address} ended" in caplog.text)
    assert code_of(fetch(decode, prefill)) is None


@pytest.mark.parametrize("security", ["authenticated", "encrypted"])
def test_no_answer_comes_before_its_keys(make: Cores, security: str) -> None:
    """Lanes run beside the control thread: the sealed welcome may come back at once."""
    prefill = make({"security": security})
    for _ in range(60):
        decode = make({"security": security})
        assert code_of(fetch(decode, prefill)) is None
        decode.close()


def test_a_recorded_handshake_is_worth_nothing(make: Cores, make_proxy: Callable[..., Proxy]) -> None:
    prefill, decode = make({}), make({})
    recorded: list[bytes] = []

    def record(_: int, data: bytes) -> bytes:
        recorded.append(data)
        return data

    port = parse_address(prefill.addresses[0])[1]
    proxy = make_proxy(prefill.addresses[0], record)
    prefill.sessions.addresses = (proxy.address,)
    assert code_of(fetch(decode, prefill, proxy.address)) is None
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as replayed:
        replayed.sendall(b"".join(recorded))
        with contextlib.suppress(ConnectionResetError):
            while replayed.recv(1 << 16):
                pass
    wait_until(refused(prefill, "bad_secret"))
    wait_until(lambda: len(prefill.sessions) == 1)


# -- strangers


def test_idle_sockets_keep_nobody_out(make: Cores) -> None:
    prefill, decode = make({}), make({})
    for first in (b"", header(PREFACE)):
        idle = [
            socket.create_connection(parse_address(prefill.addresses[0]), timeout=PATIENCE_S)
            for _ in range(IDLE)
        ]
        for one in idle:
            one.sendall(first)
        time.sleep(0.5)  # whoever is at it proves who it is by then
        newcomer = make({})
        assert code_of(fetch(newcomer, prefill)) is None
        assert code_of(fetch(decode, prefill)) is None
        for one in idle:
            one.close()
    assert prefill.sessions.refusals.by_code["busy"] > 0


NOISE = {
    "bytes": np.random.default_rng(5).bytes(4096),
    "http": b"GET / HTTP/1.1\r\nHost: prefill\r\n\r\n" + bytes(64),
    "a preface and noise": header(PREFACE) + np.random.default_rng(6).bytes(4096),
    "a message that is none": header(PREFACE) + header(MESSAGE, length=64) + bytes(64),
    "data before the handshake": header(PREFACE) + header(3, length=64, window=1) + bytes(96),
    "a ping": header(PREFACE) + header(5),
}


@pytest.mark.parametrize("noise", NOISE)
def test_noise_is_refused_counted_and_logged_with_its_address(
    make: Cores, noise: str, caplog: pytest.LogCaptureFixture
) -> None:
    prefill, decode = make({}), make({})
    with socket.create_connection(parse_address(prefill.addresses[0]), timeout=PATIENCE_S) as stranger:
        stranger.sendall(NOISE[noise])
        name = "{}:{}".format(*stranger.getsockname())
        wait_until(lambda: sum(prefill.sessions.refusals.by_code.values()) == 1)
        wait_until(lambda: f"refused {name}: " in caplog.text)
    assert code_of(fetch(decode, prefill)) is None


def test_a_flood_of_refusals_is_a_line_a_second(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    now, noted = 100.0, list[None]()
    refusals = Refusals(lambda: noted.append(None), Flood(lambda: now))
    for number in range(1000):
        refusals.note(f"192.0.2.1:{number}", Reason(Code.PROTOCOL, "noise"))
    refusals.note("192.0.2.2:1", Reason(Code.BAD_SECRET, "another code has its own line"))
    assert len(caplog.records) == 2 and refusals.by_code["protocol"] == 1000 == len(noted) - 1
    now += QUIET_S
    refusals.note("192.0.2.1:7\nforged line", Reason(Code.PROTOCOL, "noise"), 3)
    last = caplog.records[-1].getMessage()
    assert "999" not in last and "(1001 more of this kind since the last line)" in last
    assert "\n" not in last and refusals.by_code["protocol"] == 1003


def test_nothing_shows_keys_or_secrets(make: Cores) -> None:
    core: Any = make({})
    decode = make({})
    assert code_of(fetch(decode, core)) is None
    session = next(iter(core.sessions._sessions.values()))
    assert session.handshake is None, "what keys could be derived from again is gone"
    assert SECRET not in repr(core.sessions._identity) + repr(core.config) + str(session.plan)
