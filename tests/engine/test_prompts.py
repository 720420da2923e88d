# SPDX-License-Identifier: Apache-2.0
"""A transfer belongs to one prompt: who names another one's id gets nothing, and hears why at once."""

from __future__ import annotations

import pytest

from sage_kv_connector.contract.prompt import Prompt, PromptDigest
from sage_kv_connector.engine.transfer.offer import OfferTerms
from tests.engine.paged_side import PAGE_SIZE, MakeCore, Side, assert_pages_equal, eventually

X = Prompt(range(100, 100 + 3 * PAGE_SIZE))
Y = Prompt(range(500, 500 + 3 * PAGE_SIZE))


@pytest.fixture
def sides(make_core: MakeCore) -> tuple[Side, Side]:
    return Side(make_core(), 1), Side(make_core(), 2)


def error(side: Side) -> str:
    return side.outcomes.get(timeout=5).error


OTHERS = {
    "another prompt": (Y.whole, "prompt", "differ"),
    "another salt": (Prompt(range(100, 100 + 3 * PAGE_SIZE), salt="b").whole, "prompt", "differ"),
    "another prompt, shorter": (Y.digest(9), "prompt", "first 9 tokens"),
    "a longer one": (PromptDigest(25, bytes(16)), "tokens", "prefill has 24 tokens, 25 asked for"),
}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("other", OTHERS)
def test_another_prompt_gets_no_byte(sides: tuple[Side, Side], other: str, finished: bool) -> None:
    prefill, decode = sides
    prompt, code, words = OTHERS[other]
    prefill.prefilled("t", [3, 4, 5], OfferTerms(prompt=X))
    decode.subscribe(prefill, "t", range(3), [7, 8, 9], prompt=prompt, finished=finished)
    why = error(decode)
    assert why.startswith(f"{code}: ")
    assert words in why
    assert prefill.backend().counters()["posts"] == 0
    decode.subscribe(prefill, "t", range(3), [7, 8, 9], prompt=X.whole)
    assert not error(decode), "whose KV it is still gets it"
    assert_pages_equal(prefill, [3, 4, 5], decode, [7, 8, 9])


def test_a_prompt_that_ends_earlier_gets_the_beginning(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    prefill.prefilled("t", [3, 4, 5], OfferTerms(prompt=X))
    decode.subscribe(prefill, "t", range(2), [7, 8], prompt=X.digest(2 * PAGE_SIZE - 1))
    assert not error(decode)


def test_a_state_is_had_for_its_own_number_of_tokens_only(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    prefill.prefilled("t", [3, 4, 5], OfferTerms(prompt=X, exact=True))
    decode.subscribe(prefill, "t", range(2), [7, 8], prompt=X.digest(2 * PAGE_SIZE), finished=True)
    assert "a state after 24 tokens" in error(decode)


def test_the_prompts_of_one_request_find_their_own_kv(sides: tuple[Side, Side]) -> None:
    """vLLM answers a list of prompts with the first one's transfer."""
    prefill, decode = sides
    prefill.prefilled("first", [3, 4, 5], OfferTerms(prompt=X))
    prefill.prefilled("second", [10, 11, 12], OfferTerms(prompt=Y))
    decode.subscribe(prefill, "first", range(3), [0, 1, 2], prompt=Y.whole, finished=True)
    decode.subscribe(prefill, "first", range(3), [7, 8, 9], prompt=X.whole, finished=True)
    assert [error(decode), error(decode)] == ["", ""]
    assert_pages_equal(prefill, [10, 11, 12], decode, [0, 1, 2])
    assert_pages_equal(prefill, [3, 4, 5], decode, [7, 8, 9])
    assert {prefill.released.get(timeout=5).ok for _ in range(2)} == {True}


@pytest.mark.parametrize("early", [True, False])
def test_samples_of_one_prompt_use_up_all_its_offers(sides: tuple[Side, Side], early: bool) -> None:
    prefill, decode = sides

    def subscribe() -> None:
        for pages in ([0, 1, 2], [7, 8, 9]):
            decode.subscribe(prefill, "t", range(3), pages, prompt=X.whole)

    if early:
        subscribe()
        eventually(lambda: prefill.core.counters()["offers"] == 2)
    prefill.prefilled("t", [3, 4, 5], OfferTerms(prompt=X, family="t"))
    prefill.prefilled("u", [10, 11, 12], OfferTerms(prompt=X, family="t"))
    if not early:
        subscribe()
    assert [error(decode), error(decode)] == ["", ""]
    assert sorted(prefill.released.get(timeout=5).transfer_id for _ in range(2)) == ["t", "u"]


def test_a_subscription_waits_for_its_own_prompt_of_an_id(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    decode.subscribe(prefill, "t", range(3), [7, 8, 9], prompt=Y.whole)
    eventually(lambda: prefill.core.counters()["offers"] == 1)
    prefill.prefilled("t", [3, 4, 5], OfferTerms(prompt=X, family="t"))
    prefill.prefilled("u", [10, 11, 12], OfferTerms(prompt=Y, family="t"))
    assert not error(decode)
    assert_pages_equal(prefill, [10, 11, 12], decode, [7, 8, 9])


def test_a_subscription_that_waits_hears_that_another_prompt_came(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    decode.subscribe(prefill, "t", range(3), [7, 8, 9], prompt=Y.whole)
    eventually(lambda: prefill.core.counters()["offers"] == 1)
    prefill.prefilled("t", [3, 4, 5], OfferTerms(prompt=X))
    assert error(decode).startswith("prompt: ")


def test_what_was_fetched_is_said_soon_to_whoever_comes_late(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    prefill.prefilled("t", [3, 4, 5], OfferTerms(prompt=X))
    decode.subscribe(prefill, "t", range(3), [7, 8, 9], prompt=X.whole)
    assert not error(decode)
    decode.subscribe(prefill, "t", range(3), [7, 8, 9], prompt=X.whole)
    assert "it was fetched" in error(decode)


def test_another_prompt_s_release_leaves_the_offer_alone(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    prefill.prefilled("t", [3, 4, 5], OfferTerms(prompt=X))
    decode.core.release(prefill.address(), "t", prompt=Y.whole)
    decode.subscribe(prefill, "t", range(3), [7, 8, 9], prompt=X.whole, finished=True)
    assert not error(decode)
    assert prefill.released.get(timeout=5).ok


def test_a_consumer_that_knows_no_prompt_goes_by_the_id(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    prefill.prefilled("t", [3, 4, 5], OfferTerms(prompt=X))
    decode.subscribe(prefill, "t", range(3), [7, 8, 9], finished=True)
    assert not error(decode)
