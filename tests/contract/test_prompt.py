# SPDX-License-Identifier: Apache-2.0
"""A digest says the same of the same beginning of a prompt, and another thing of any other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_kv_connector.contract.prompt import DIGEST_BYTES, Prompt, PromptItem

TOKENS = st.lists(st.integers(0, (1 << 32) - 2), min_size=1, max_size=40)


@given(TOKENS, TOKENS, st.data())
def test_a_prompt_that_goes_on_has_the_digests_of_its_beginning(
    begun: list[int], more: list[int], data: st.DataObject
) -> None:
    tokens = data.draw(st.integers(0, len(begun)))
    assert Prompt(begun).digest(tokens) == Prompt(begun + more).digest(tokens)


@given(TOKENS, st.data())
def test_one_other_token_is_another_digest(ids: list[int], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(ids) - 1))
    changed = [*ids[:place], ids[place] + 1, *ids[place + 1 :]]
    for tokens in range(len(ids) + 1):
        same = Prompt(ids).digest(tokens) == Prompt(changed).digest(tokens)
        assert same == (tokens <= place)


IMAGE = PromptItem(2, 3, "a1")
VARIANTS = {
    "plain": Prompt([1, 2, 3, 3, 3, 4]),
    "salt": Prompt([1, 2, 3, 3, 3, 4], salt="x"),
    "adapter": Prompt([1, 2, 3, 3, 3, 4], adapter="x"),
    "salt and adapter, cut elsewhere": Prompt([1, 2, 3, 3, 3, 4], salt="xx", adapter=""),
    "adapter and salt, cut elsewhere": Prompt([1, 2, 3, 3, 3, 4], salt="", adapter="xx"),
    "image": Prompt([1, 2, 3, 3, 3, 4], items=[IMAGE]),
    "another image": Prompt([1, 2, 3, 3, 3, 4], items=[IMAGE._replace(identity="b1")]),
    "the image elsewhere": Prompt([1, 2, 3, 3, 3, 4], items=[IMAGE._replace(offset=1)]),
    "longer image": Prompt([1, 2, 3, 3, 3, 4], items=[IMAGE._replace(length=2)]),
    "two images": Prompt([1, 2, 3, 3, 3, 4], items=[IMAGE, IMAGE]),
    "embeddings": Prompt([1, 2, 3, 3, 3, 4], embeddings=bytes(96)),
    "other embeddings": Prompt([1, 2, 3, 3, 3, 4], embeddings=bytes(95) + b"\1"),
}


def test_whatever_kv_depends_on_makes_another_digest() -> None:
    digests = [prompt.whole.digest for prompt in VARIANTS.values()]
    assert len(set(digests)) == len(VARIANTS)
    assert {len(digest) for digest in digests} == {DIGEST_BYTES}


def test_an_image_counts_from_its_first_token_on() -> None:
    plain, image = VARIANTS["plain"], VARIANTS["image"]
    assert [plain.digest(n) == image.digest(n) for n in range(5)] == [True, True, True, False, False]


def test_the_digest_is_that_of_the_protocol() -> None:
    """Frozen: both sides of a transfer may be of different releases."""
    prompt = Prompt([5, 6, 7], salt="s", adapter="a", items=[PromptItem(1, 2, "i")])
    assert prompt.digest(2).digest.hex() == "9f458ba69f4fcb5a6a7208199d379f5d"
    assert Prompt([5, 6, 7]).whole.digest.hex() == "0d5663813a0c7a355f6deaa00d51f4fc"


def test_no_more_tokens_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"tokens is 4, allowed: 0 to 3"):
        Prompt([1, 2, 3]).digest(4)
