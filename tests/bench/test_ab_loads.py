# SPDX-License-Identifier: Apache-2.0
"""Every arm gets the same requests, and each load is what its name says."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_kv_connector.bench.ab.loads import CLIENTS, DOCUMENTS, PAGE, QUESTION, TURN, LoadError, Queue, made

LOADS = ("closed-1", "closed-4", "closed-16", "open-50", "rag", "chat")


def prompts(queues: list[Queue]) -> list[list[int]]:
    return [request.prompt for queue in queues for request in queue]


@given(st.sampled_from(LOADS), st.integers(2 * PAGE, 40 * PAGE), st.integers(1, 20), st.text(max_size=5))
def test_a_seed_makes_the_same_requests(load: str, tokens: int, requests: int, seed: str) -> None:
    queues = made(load, tokens, requests, seed, 3.0)
    assert queues == made(load, tokens, requests, seed, 3.0)
    assert len(prompts(queues)) == requests and all(queues)
    assert prompts(queues) != prompts(made(load, tokens, requests, seed + "-", 3.0))
    # Decode computes one token of what it was handed over; all else is whole pages.
    assert {len(prompt) % PAGE for prompt in prompts(queues)} == {1}


@pytest.mark.parametrize("clients", [1, 4, 16])
def test_a_closed_loop_has_its_clients_and_no_shared_page(clients: int) -> None:
    queues = made(f"closed-{clients}", 1024, 32, "", None)
    assert [len(queue) for queue in queues] == [32 // clients] * clients
    assert len({tuple(prompt[:PAGE]) for prompt in prompts(queues)}) == 32
    assert {request.at_s for queue in queues for request in queue} == {None}


def test_an_open_load_comes_at_its_share_of_the_link() -> None:
    times = [queue[0].at_s for queue in made("open-50", 256, 4000, "", 8.0)]
    assert times[0] == 0 and times == sorted(times)  # type: ignore[type-var]
    assert times[-1] == pytest.approx(4000 / 4.0, rel=0.1)


def test_documents_are_shared_and_some_are_popular() -> None:
    asked = prompts(made("rag", 64 * PAGE, 200, "", None))
    documents = Counter(tuple(prompt[: -QUESTION - 1]) for prompt in asked)
    assert len(documents) == DOCUMENTS and documents.most_common(1)[0][1] > 200 / DOCUMENTS
    assert all(31 * PAGE <= len(document) <= 64 * PAGE for document in documents)
    assert len({tuple(prompt) for prompt in asked}) == 200


def test_a_turn_repeats_what_was_said() -> None:
    queues = made("chat", 1024, 10, "", None)
    assert [len(queue) for queue in queues] == [3, 3, 2, 2] and len(queues) == CLIENTS
    for queue in queues:
        for before, after in pairwise(queue):
            assert after.prompt[: len(before.prompt) - 1] == before.prompt[:-1]
            assert len(after.prompt) == len(before.prompt) + TURN


@pytest.mark.parametrize("name", ["closed-0", "closed", "open-0", "open-", "batch", ""])
def test_a_load_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(LoadError, match="is none of closed-N, open-P, rag, chat"):
        made(name, 1024, 1, "", 1.0)


def test_an_open_load_wants_a_rate() -> None:
    with pytest.raises(LoadError, match="want a link with a rate"):
        made("open-50", 1024, 1, "", None)
