# SPDX-License-Identifier: Apache-2.0
"""A store in a process of its own, over shm and tcp: bytes are equal or it is a miss, in bounded time."""

from __future__ import annotations

import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from integration_tests.tcp_proxy import TcpProxy
from sage_kv_connector.config import SECRET_ENV, KVTransportConfig
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.launch.store import StoreProcess, store_process
from sage_kv_connector.store.backoff import Backoff
from sage_kv_connector.store.client import StoreClient
from sage_kv_connector.store.messages import MAX_KEYS
from tests.store.pages import Pages

MakeClient = Callable[..., StoreClient]
SECRET = secrets.token_urlsafe(16)


@pytest.fixture(scope="module")
def store() -> Iterator[StoreProcess]:
    with store_process("64MiB", env={SECRET_ENV: SECRET}) as process:
        yield process


@pytest.fixture
def make_client() -> Iterator[MakeClient]:
    clients: list[StoreClient] = []

    def make(
        *addresses: str, backend: str = "auto", secret: str = SECRET, deadline_s: float = 5.0
    ) -> StoreClient:
        config = KVTransportConfig.load({"backend": backend, "secret": secret, "host": "127.0.0.1"})
        clients.append(StoreClient(addresses, config, deadline_s=deadline_s, backoff=Backoff(0.2, 0.4)))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def after_the_pause(call: Callable[[], list[bool]]) -> list[bool]:
    time.sleep(0.5)
    return call()


@pytest.mark.parametrize("backend", ["auto", "shm", "tcp"])
@pytest.mark.parametrize("piece", [100, 4096, 70_000])
def test_what_was_put_comes_back(
    store: StoreProcess, make_client: MakeClient, backend: str, piece: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    client = make_client(store.address("shm" if backend == "shm" else "tcp"), backend=backend)
    assert client.clear()
    assert ("backend='shm'" in caplog.text) == (backend != "tcp"), "shared memory where it can be"
    source, target = Pages(client, 20, piece, 3, seed=1), Pages(client, 20, piece, 3)
    keys = [f"key {i} é" for i in range(20)]
    assert client.held(keys) == [False] * 20
    assert client.put(keys, source.items) == [True] * 20
    assert client.held([*keys, "other"]) == [True] * 20 + [False]
    wanted = [3, 19, 0, 7]
    found = client.get(
        [*(keys[i] for i in wanted), "other"], [*(target.items[i] for i in wanted), target.items[1]]
    )
    assert found == [True, True, True, True, False]
    assert [target.content(i) for i in wanted] == [source.content(i) for i in wanted]
    assert target.content(1) == bytes(3 * piece), "a miss writes nothing"


def test_two_clients_share_and_the_same_key_is_kept_once(
    store: StoreProcess, make_client: MakeClient
) -> None:
    first, second = make_client(store.address("tcp")), make_client(store.address("tcp"), backend="tcp")
    first.clear()
    mine, theirs = Pages(first, 4, 5000, seed=1), Pages(second, 4, 5000, seed=2)
    keys = ["a", "b", "c", "d"]
    before = first.stats()
    assert first.put(keys[:2], mine.items[:2]) == [True, True]
    assert second.put(keys, theirs.items) == [True] * 4, "those that are there count as kept"
    after = second.stats()
    assert before is not None and after is not None
    assert after.put_entries - before.put_entries == 4 and after.put_bytes - before.put_bytes == 4 * 10_000
    back = Pages(second, 4, 5000)
    assert second.get(keys, back.items) == [True] * 4
    assert [back.content(i) for i in range(4)] == [
        mine.content(0),
        mine.content(1),
        theirs.content(2),
        theirs.content(3),
    ]


def test_a_key_of_another_size_is_a_miss_and_stays(store: StoreProcess, make_client: MakeClient) -> None:
    client = make_client(store.address("tcp"))
    client.clear()
    small, large = Pages(client, 1, 5000, seed=1), Pages(client, 1, 6000, seed=2)
    assert client.put(["k"], small.items) == [True]
    assert client.put(["k"], large.items) == [False]
    assert client.get(["k"], large.items) == [False]
    back = Pages(client, 1, 5000)
    assert client.get(["k"], back.items) == [True] and back.content(0) == small.content(0)


def test_one_key_twice_in_a_call(store: StoreProcess, make_client: MakeClient) -> None:
    client = make_client(store.address("tcp"))
    client.clear()
    pages, back = Pages(client, 2, 5000, seed=1), Pages(client, 2, 5000)
    assert client.put(["k", "k"], pages.items) == [True, True]
    assert client.get(["k", "k"], back.items) == [True, True]
    assert back.content(0) == back.content(1) == pages.content(0)


def test_more_than_one_question_holds(store: StoreProcess, make_client: MakeClient) -> None:
    client = make_client(store.address("tcp"))
    client.clear()
    count = MAX_KEYS + 10
    source, target = Pages(client, count, 128, 1, seed=3), Pages(client, count, 128, 1)
    keys = [f"{i}" for i in range(count)]
    assert all(client.put(keys, source.items)) and all(client.held(keys))
    assert all(client.get(keys, target.items)) and (source.data == target.data).all()


def test_the_least_recently_used_are_evicted(store: StoreProcess, make_client: MakeClient) -> None:
    client = make_client(store.address("tcp"))
    client.clear()
    pages = Pages(client, 20, 2 << 20, seed=4)  # 16 of 4 MiB fit
    keys = [f"{i}" for i in range(20)]
    for i in range(16):
        assert client.put([keys[i]], [pages.items[i]]) == [True]
    back = Pages(client, 20, 2 << 20)
    assert client.get([keys[0]], [back.items[0]]) == [True], "now it is the youngest"
    assert client.put(keys[16:], pages.items[16:]) == [True] * 4
    found = client.get(keys, back.items)
    assert found == [True] + [False] * 4 + [True] * 15
    assert all(back.content(i) == pages.content(i) for i, flag in enumerate(found) if flag)
    stats = client.stats()
    assert stats is not None and stats.evicted >= 4 and stats.held_bytes == 64 << 20


def test_what_can_never_fit_is_not_kept(store: StoreProcess, make_client: MakeClient) -> None:
    client = make_client(store.address("tcp"))
    client.clear()
    pages = Pages(client, 1, 65 << 20, 1)
    assert client.put(["huge"], pages.items) == [False]
    assert client.held(["huge"]) == [False]


def test_clear_removes_by_prefix(store: StoreProcess, make_client: MakeClient) -> None:
    client = make_client(store.address("tcp"))
    client.clear()
    pages = Pages(client, 2, 1000, seed=5)
    client.put(["a:1", "b:1"], pages.items)
    assert client.clear("a:")
    assert client.held(["a:1", "b:1"]) == [False, True]


def test_many_threads_at_once(store: StoreProcess, make_client: MakeClient) -> None:
    client = make_client(store.address("tcp"), deadline_s=60.0)
    client.clear()
    wrong: list[str] = []

    def work(seed: int) -> None:
        source, target = Pages(client, 8, 9000, seed=seed), Pages(client, 8, 9000)
        keys = [f"{seed}/{i}" for i in range(8)]
        for _ in range(5):
            if not all(client.put(keys, source.items)) or not all(client.get(keys, target.items)):
                wrong.append(f"{seed}: missed")
            elif (source.data != target.data).any():
                wrong.append(f"{seed}: other bytes")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_without_the_secret_nothing_is_told(
    store: StoreProcess, make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = make_client(store.address("tcp"), secret="another")
    pages = Pages(stranger, 1, 1000, seed=6)
    assert stranger.put(["k"], pages.items) == [False]
    assert "secret" in caplog.text
    assert stranger.stats() is None


@pytest.mark.parametrize("backend", ["shm", "tcp"])
def test_a_server_that_dies_is_a_miss_and_another_one_serves(
    make_client: MakeClient, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    with store_process("64MiB", env={SECRET_ENV: SECRET}) as store:
        address = store.address("tcp")
        client = make_client(address, backend="auto" if backend == "shm" else "tcp")
        source, target = Pages(client, 4, 100_000, seed=7), Pages(client, 4, 100_000)
        keys = ["a", "b", "c", "d"]
        assert all(client.put(keys, source.items))
        store.popen.send_signal(signal.SIGKILL)
        begun = time.monotonic()
        assert client.get(keys, target.items) == [False] * 4
        assert client.put(["e"], source.items[:1]) == [False] and client.held(keys) == [False] * 4
        assert time.monotonic() - begun < 3
        assert "left alone" in caplog.text
    with store_process("64MiB", port=int(address.rpartition(":")[2]), env={SECRET_ENV: SECRET}):
        assert after_the_pause(lambda: client.put(keys, source.items)) == [True] * 4
        assert client.get(keys, target.items) == [True] * 4 and (source.data == target.data).all()


@pytest.fixture
def proxied() -> Iterator[TcpProxy]:
    """Of a store that knows of it."""
    port = free_port()
    proxy = TcpProxy(port)
    options = (f"advertise_port={proxy.port}",)
    with store_process("64MiB", port=port, options=options, env={SECRET_ENV: SECRET}):
        yield proxy
    proxy.close()


def test_a_server_that_is_cut_off_while_it_sends_is_a_miss(
    proxied: TcpProxy, make_client: MakeClient
) -> None:
    client = make_client(f"tcp://127.0.0.1:{proxied.port}", backend="tcp", deadline_s=30.0)
    client.clear()
    source, target = Pages(client, 4, 500_000, seed=8), Pages(client, 4, 500_000)
    assert all(client.put(["a", "b", "c", "d"], source.items))
    proxied.hold_at(700_000)
    answers: list[list[bool]] = []
    thread = threading.Thread(target=lambda: answers.append(client.get(["a", "b", "c", "d"], target.items)))
    thread.start()
    assert proxied.held.wait(10)
    begun = time.monotonic()
    proxied.cut()
    thread.join(10)
    assert answers == [[False] * 4] and time.monotonic() - begun < 5


def test_a_slow_server_is_a_miss_at_the_deadline_and_its_bytes_come_nowhere(
    proxied: TcpProxy, make_client: MakeClient
) -> None:
    client = make_client(f"tcp://127.0.0.1:{proxied.port}", backend="tcp", deadline_s=1.0)
    client.clear()
    source, target = Pages(client, 4, 500_000, seed=8), Pages(client, 4, 500_000)
    assert all(client.put(["a", "b", "c", "d"], source.items))
    proxied.hold_at(700_000)
    begun = time.monotonic()
    assert client.get(["a", "b", "c", "d"], target.items) == [False] * 4
    assert 0.9 < time.monotonic() - begun < 4
    begun = time.monotonic()
    assert client.get(["a"], target.items[:1]) == [False] and client.held(["a"]) == [False]
    assert time.monotonic() - begun < 0.1, "it is left alone for a while"
    target.data[:] = 0
    proxied.let_go()
    assert after_the_pause(lambda: client.held(["a"])) == [True]
    assert not target.data.any(), "what comes late is not written any more"


def test_a_flipped_byte_is_a_miss_and_the_next_get_is_right(
    proxied: TcpProxy, make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    client = make_client(f"tcp://127.0.0.1:{proxied.port}", backend="tcp")
    client.clear()
    source, target = Pages(client, 4, 100_000, seed=9), Pages(client, 4, 100_000)
    keys = ["a", "b", "c", "d"]
    assert all(client.put(keys, source.items))
    proxied.flip_byte_at(300_000)
    assert client.get(keys, target.items) == [False] * 4
    assert proxied.flipped and "forged" in caplog.text
    assert after_the_pause(lambda: client.get(keys, target.items)) == [True] * 4
    assert (source.data == target.data).all()


@pytest.mark.parametrize(
    ("addresses", "options", "says"),
    [
        ((), {}, "at least one is needed"),
        (("http://x",), {}, "must begin with shm:// or tcp://"),
        (("shm://x",), {"backend": "tcp"}, "must begin with tcp://"),
        (("tcp://127.0.0.1:1",), {"deadline_s": 0}, "deadline_s is 0"),
        (("tcp://127.0.0.1:1",), {"deadline_s": float("inf")}, "deadline_s is inf"),
    ],
)
def test_bad_options_are_named(
    make_client: MakeClient, addresses: tuple[str, ...], options: dict[str, object], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        make_client(*addresses, **options)


@pytest.mark.parametrize("keys", [[""], ["x" * 257]])
def test_bad_keys_are_the_callers_error(
    store: StoreProcess, make_client: MakeClient, keys: list[str]
) -> None:
    client = make_client(store.address("tcp"))
    pages = Pages(client, 1, 1000)
    for call in (client.put, client.get):
        with pytest.raises(ValueError, match="a key has"):
            call(keys, pages.items)
    with pytest.raises(ValueError, match="items has 1 entries, keys has 2"):
        client.put(["a", "b"], pages.items)
    with pytest.raises(ValueError, match="an item has no bytes"):
        client.put(["a"], [pages.items[0][:0]])
    assert client.put([], []) == client.get([], []) == client.held([]) == []
