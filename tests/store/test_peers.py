# SPDX-License-Identifier: Apache-2.0
"""Servers that lie to a client, and clients that leave a server alone in the middle."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sage_kv_connector.backends.base import Status
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.engine.core import EngineCore
from sage_kv_connector.engine.pages.memory import MemorySource
from sage_kv_connector.engine.session.questions import Question, Reply
from sage_kv_connector.store import messages as sm
from sage_kv_connector.store.client import StoreClient
from sage_kv_connector.store.server import KVStore
from tests.engine.memory_backend import MemoryBackend
from tests.store.pages import Pages

MakeClient = Callable[..., StoreClient]
KEYS = ["a", "b"]


@pytest.fixture
def liar(memory_backend: None, make_core: Callable[..., EngineCore]) -> EngineCore:
    """A server that says who it is, and what a test lets it say."""
    core = make_core()
    where = sm.encode(sm.Where("liar", "", ()))
    core.serve(sm.WHERE, lambda question, body: question.answer(where))
    return core


LIES = {
    "noise": b"\xc1\x00noise",
    "nothing": b"",
    "another body": sm.encode(sm.Cleared(3)),
    "too few flags": sm.encode(sm.Flags((True,))),
    "too many flags": sm.encode(sm.Flags((True,) * 3)),
    "an offer of too many": sm.encode(sm.Offered("t", (True,) * 3)),
    "an offer that is not there": sm.encode(sm.Offered("never", (True, True))),
    "an offer without a name": sm.encode(sm.Offered("", (True, False))),
}


@pytest.mark.parametrize("lie", list(LIES))
def test_a_lie_is_a_miss_a_warning_and_a_pause(
    liar: EngineCore, in_process_client: MakeClient, lie: str, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []

    def say(verb: str) -> Callable[[Question, bytes], None]:
        def answer(question: Question, body: bytes) -> None:
            asked.append(verb)
            question.answer(LIES[lie])

        return answer

    for verb in (sm.PUT, sm.GET, sm.HELD, sm.STATS, sm.CLEAR):
        liar.serve(verb, say(verb))
    client = in_process_client(*liar.addresses)
    pages = Pages(client, 2, 1000)
    begun = time.monotonic()
    assert client.get(KEYS, pages.items) == [False, False]
    assert "left alone" in caplog.text and asked == [sm.GET]
    assert client.put(KEYS, pages.items) == [False, False] and asked == [sm.GET], "not asked again at once"
    time.sleep(0.15)
    if "offer" in lie:
        return
    assert client.put(KEYS, pages.items) == [False, False]
    time.sleep(0.15)
    assert client.held(KEYS) == [False, False]
    assert asked == [sm.GET, sm.PUT, sm.HELD]
    assert time.monotonic() - begun < 2


def test_an_offer_of_fewer_bytes_than_asked_for_is_a_miss(
    liar: EngineCore, in_process_client: MakeClient
) -> None:
    memory = np.ones(100, dtype=np.uint8)
    liar.register_memory([(int(memory.ctypes.data), 100)])
    segments = np.array([[memory.ctypes.data, 100]], dtype=np.uint64)

    def offer(question: Question, body: bytes) -> None:
        liar.offer("short", MemorySource(segments), lambda outcome: None)
        question.answer(sm.encode(sm.Offered("short", (True, True))))

    liar.serve(sm.GET, offer)
    client = in_process_client(*liar.addresses)
    pages = Pages(client, 2, 1000)
    assert client.get(KEYS, pages.items) == [False, False]
    assert not pages.data.any()


def test_a_silent_server_is_a_miss_at_the_deadline(liar: EngineCore, in_process_client: MakeClient) -> None:
    for verb in (sm.PUT, sm.GET, sm.HELD):
        liar.serve(verb, lambda question, body: None)
    client = in_process_client(*liar.addresses, deadline_s=0.3)
    pages = Pages(client, 2, 1000)
    calls: list[Callable[[], list[bool]]] = [
        lambda: client.put(KEYS, pages.items),
        lambda: client.get(KEYS, pages.items),
        lambda: client.held(KEYS),
    ]
    for call in calls:
        begun = time.monotonic()
        assert call() == [False, False]
        assert 0.25 < time.monotonic() - begun < 1.5
        time.sleep(0.15)


def test_pauses_get_longer_and_end_with_an_answer(
    liar: EngineCore, in_process_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    client = in_process_client(*liar.addresses)
    for pause in (0.05, 0.1, 0.1):
        assert client.held(["a"]) == [False]
        assert client.held(["a"]) == [False], "not asked"
        time.sleep(pause + 0.02)
    assert caplog.text.count("left alone") == 3
    liar.serve(sm.HELD, lambda question, body: question.answer(sm.encode(sm.Flags((True,)))))
    assert client.held(["a"]) == [True] and client.held(["a"]) == [True]


@pytest.fixture
def store(memory_backend: None) -> Iterator[KVStore]:
    store = KVStore(1 << 20)
    store.start()
    yield store
    store.close()


def test_a_put_that_is_under_way_is_not_seen_and_a_second_one_waits_for_it(
    store: KVStore, in_process_client: MakeClient
) -> None:
    first, second = (in_process_client(*store.addresses, deadline_s=10.0) for _ in range(2))
    pages, others, back = (
        Pages(first, 2, 1000, seed=1),
        Pages(second, 2, 1000, seed=2),
        Pages(second, 2, 1000),
    )
    backend = first._core.backends["memory"]
    assert isinstance(backend, MemoryBackend)
    backend.hold_posts = True
    with ThreadPoolExecutor(2) as pool:
        writing = pool.submit(first.put, KEYS, pages.items)
        while not backend.counters()["posts"]:
            time.sleep(0.005)
        assert second.held(KEYS) == [False, False]
        assert second.get(KEYS, back.items) == [False, False]
        waiting = pool.submit(second.put, KEYS, others.items)
        time.sleep(0.1)
        assert not waiting.done()
        backend.let_posts_go()
        assert writing.result(5) == waiting.result(5) == [True, True]
    assert second.get(KEYS, back.items) == [True, True]
    assert back.content(0) == pages.content(0), "kept once: the first one's"
    stats = store.stats()
    assert stats.put_entries == 2 and stats.entries == 2


def test_a_put_that_fails_on_its_way_keeps_nothing_and_may_be_tried_again(
    store: KVStore, in_process_client: MakeClient
) -> None:
    client = in_process_client(*store.addresses)
    pages = Pages(client, 2, 1000, seed=1)
    backend = client._core.backends["memory"]
    assert isinstance(backend, MemoryBackend)
    backend.fail_window = Status.CHECKSUM_MISMATCH
    assert client.put(KEYS, pages.items) == [False, False]
    assert client.held(KEYS) == [False, False]
    assert store.stats().failed_transfers == 1 and store.stats().entries == 0
    backend.fail_window = None
    assert client.put(KEYS, pages.items) == [True, True]


def test_a_client_that_ends_in_a_put_leaves_nothing(store: KVStore, in_process_client: MakeClient) -> None:
    client, other = (in_process_client(*store.addresses, deadline_s=5.0) for _ in range(2))
    pages = Pages(client, 2, 1000, seed=1)
    backend = client._core.backends["memory"]
    assert isinstance(backend, MemoryBackend)
    backend.hold_posts = True
    answers: list[list[bool]] = []
    thread = threading.Thread(target=lambda: answers.append(client.put(KEYS, pages.items)))
    thread.start()
    while not backend.counters()["posts"]:
        time.sleep(0.005)
    for connection in list(backend._ends):
        backend.close_connection(connection)
    thread.join(5)
    assert answers == [[False, False]]
    until = time.monotonic() + 5
    while store.stats().entries:
        assert time.monotonic() < until, "what did not land is gone"
    assert store.stats().failed_transfers == 1
    whole = Pages(other, 1, 1 << 20, 1, seed=3)
    assert other.put(["all"], whole.items) == [True], "its room is free again"


def test_a_get_that_is_not_fetched_does_not_pin_for_ever(
    memory_backend: None, make_core: Callable[..., EngineCore]
) -> None:
    from sage_kv_connector.config import KVTransportConfig

    store = KVStore(1 << 20, KVTransportConfig(lease_s=0.3))
    store.start()
    try:
        client = StoreClient(store.addresses)
        whole = Pages(client, 2, 1 << 20, 1, seed=3)
        assert client.put(["one"], whole.items[:1]) == [True]
        asker = make_core()
        replies: queue.Queue[Reply] = queue.Queue()
        body = sm.encode(sm.Get(("one",), (1 << 20,)))
        asker.ask(PeerAddress("", 0, store.addresses), sm.GET, body, replies.put, 5.0)
        assert sm.decode(replies.get(timeout=5).body, sm.Offered).flags == (True,)
        assert client.put(["two"], whole.items[1:]) == [False], "it is being read"
        time.sleep(0.6)
        assert client.put(["two"], whole.items[1:]) == [True]
        client.close()
    finally:
        store.close()


BAD = {
    "no array": b"\xff",
    "no keys": sm.encode(sm.Put("t", (), (), 1000)),
    "other sizes": sm.encode(sm.Put("t", ("a",), (1, 2), 1000)),
    "a size of nothing": sm.encode(sm.Put("t", ("a",), (0,), 1000)),
    "a size beyond": sm.encode(sm.Put("t", ("a",), (1 << 41,), 1000)),
    "no time": sm.encode(sm.Put("t", ("a",), (1,), 0)),
    "no transfer": sm.encode(sm.Put("", ("a",), (1,), 1000)),
    "a long key": sm.encode(sm.Put("t", ("a" * 257,), (1,), 1000)),
    "too many keys": sm.encode(sm.Put("t", ("a",) * 513, (1,) * 513, 1000)),
}


@pytest.mark.parametrize("bad", list(BAD))
def test_a_store_refuses_bad_questions_by_name(
    store: KVStore, make_core: Callable[..., EngineCore], bad: str
) -> None:
    asker = make_core()
    replies: queue.Queue[Reply] = queue.Queue()
    asker.ask(PeerAddress("", 0, store.addresses), sm.PUT, BAD[bad], replies.put, 5.0)
    reply = replies.get(timeout=5)
    assert reply.code == "bad_question" and reply.detail
    assert store.stats().entries == 0


def test_a_put_of_what_is_never_offered_keeps_nothing(
    store: KVStore, make_core: Callable[..., EngineCore]
) -> None:
    asker = make_core()
    replies: queue.Queue[Reply] = queue.Queue()
    body = sm.encode(sm.Put("never", ("a",), (1000,), 1000))
    asker.ask(PeerAddress("", 0, store.addresses), sm.PUT, body, replies.put, 5.0)
    assert sm.decode(replies.get(timeout=5).body, sm.Flags).flags == (False,)
    assert store.stats().entries == 0


def test_a_store_that_never_started_closes_at_once(memory_backend: None) -> None:
    store = KVStore(1 << 20)
    begun = time.monotonic()
    store.close()
    assert time.monotonic() - begun < 5


def test_closing_a_client_ends_its_calls_as_misses(liar: EngineCore, in_process_client: MakeClient) -> None:
    asked = threading.Event()
    liar.serve(sm.GET, lambda question, body: asked.set())
    client = in_process_client(*liar.addresses, deadline_s=20.0)
    pages = Pages(client, 2, 1000)
    begun = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.get, KEYS, pages.items)
        assert asked.wait(5)
        client.close()
        assert waiting.result(5) == [False, False]
    assert client.put(KEYS, pages.items) == [False, False] and client.held(KEYS) == [False, False]
    assert time.monotonic() - begun < 5
