# SPDX-License-Identifier: Apache-2.0
"""Of decode requests that begin alike, a later one waits for what the first one fetches."""

from __future__ import annotations

from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.request import RequestStatus

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.integrations.vllm.scheduler import SchedulerSide
from tests.integrations.test_vllm_orders import REMOTE, ordered
from tests.integrations.vllm_workers import PAGE, SPEC, cache_config, vllm_config

#: Asked at once with prefill, which may not have begun yet.
ASKED_AT_ONCE = {
    "do_remote_prefill": True,
    "remote_engine_id": "prefill",
    "remote_bootstrap_addr": "http://127.0.0.1:7300",
}


def made_side(*, cached: bool = True) -> SchedulerSide:
    config = vllm_config()
    config.cache_config.enable_prefix_caching = cached
    return SchedulerSide(config, cache_config(({"l0": SPEC}, SPEC)), KVTransportConfig.load({}), "engine")


@pytest.fixture
def side() -> SchedulerSide:
    return made_side()


def request(name: str, pages: str, params: dict[str, Any] = REMOTE, **more: Any) -> Any:
    """A letter a page; two requests share the pages that both begin with. Behind them there is half a page."""
    tokens = len(pages) * PAGE + PAGE // 2
    return SimpleNamespace(
        **{
            "request_id": name,
            "kv_transfer_params": params | {"transfer_id": f"of-{name}"},
            "prompt_token_ids": [ord(letter) for letter in pages for _ in range(PAGE)] + [0] * (PAGE // 2),
            "num_prompt_tokens": tokens,
            "block_hashes": [text.encode() for text in accumulate(pages)],
            "status": RequestStatus.WAITING,
            "output_token_ids": [7],
        }
        | more
    )


def asks(side: SchedulerSide, one: Any, cached_pages: int = 0) -> bool:
    """Whether vLLM is told to fetch now; then its blocks are there too."""
    tokens, _ = side.num_new_matched_tokens(one, cached_pages * PAGE)
    if tokens is None:
        return False
    blocks = SimpleNamespace(blocks=[[SimpleNamespace(block_id=i) for i in range(20)]])
    side.update_state_after_alloc(one, blocks, tokens)
    ordered(side)
    return True


def lands(side: SchedulerSide, name: str) -> None:
    side.update_connector_output(SimpleNamespace(finished_recving={name}, finished_sending=None))


def test_a_second_question_waits_until_the_document_is_in_the_cache(side: SchedulerSide) -> None:
    assert asks(side, request("first", "DOCUMENTa"))
    second = request("second", "DOCUMENTb")
    assert not asks(side, second) and not asks(side, second)
    lands(side, "first")
    assert not asks(side, second), "vLLM caches what landed in its next step"
    ordered(side)
    assert asks(side, second, cached_pages=8)


def test_what_failed_or_was_aborted_is_fetched_by_the_next_one(side: SchedulerSide) -> None:
    first, second, third = (request(name, f"DOCUMENT{name}") for name in "abc")
    assert asks(side, first) and not asks(side, second)
    side.request_finished(first, ([],))
    ordered(side)
    assert asks(side, second) and not asks(side, third), "they wait for the one that fetches now"


@pytest.mark.parametrize(
    ("pages", "cached", "fetched"),
    [
        ("DOCUMENTb", 0, False),
        ("DOCUxyzw", 0, False),  # a half of both
        ("DOCxyzwv", 0, True),  # less than a half of what it lacks
        ("DO", 0, True),  # all that it lacks, and a sixth of what is fetched
        ("XOCUMENTa", 0, True),
        ("DOCUMENTa", 8, True),  # only the last page is missing: of what is fetched it is little
        ("DOCUMENTa", 3, False),
        ("", 0, True),
    ],
)
def test_it_waits_for_much_of_what_it_lacks(
    side: SchedulerSide, pages: str, cached: int, fetched: bool
) -> None:
    assert asks(side, request("first", "DOCUMENT"))
    assert asks(side, request("second", pages), cached) is fetched


def test_what_the_first_one_does_not_fetch_is_not_waited_for(side: SchedulerSide) -> None:
    """It had these pages then, and they have left the cache since."""
    assert asks(side, request("first", "DOCUMENT"), cached_pages=4)
    assert asks(side, request("second", "DOCUMENT"))


def test_prefill_that_may_not_have_begun_delays_only_its_own(side: SchedulerSide) -> None:
    elsewhere = ASKED_AT_ONCE | {"remote_bootstrap_addr": "http://127.0.0.1:7400"}
    assert asks(side, request("first", "DOCUMENT", ASKED_AT_ONCE))
    assert not asks(side, request("second", "DOCUMENT", ASKED_AT_ONCE))
    assert asks(side, request("third", "DOCUMENT", elsewhere))
    assert asks(side, request("fourth", "DOCUMENT", REMOTE)), "its prefill is over"


@pytest.mark.parametrize("why", ["no prefix cache", "other hashes"])
def test_without_pages_hashes_nobody_waits(why: str) -> None:
    side = made_side(cached=why != "no prefix cache")
    more: dict[str, Any] = {"block_hashes": [b"one"]} if why == "other hashes" else {}
    assert asks(side, request("first", "DOCUMENT", **more))
    assert asks(side, request("second", "DOCUMENT", **more))
