# SPDX-License-Identifier: Apache-2.0
"""A suite that is narrowed keeps what was asked for, and says what there is where nothing is left."""

from __future__ import annotations

import pytest

from sage_kv_connector.bench.ab.suites import EVERYTHING, SUITES, Only


@pytest.mark.parametrize("name", SUITES)
def test_everything_is_the_whole_suite(name: str) -> None:
    assert SUITES[name].narrowed(EVERYTHING) == SUITES[name]


def test_each_word_narrows() -> None:
    only = Only(
        links=("1g",), tokens=(32768, 65536), loads=("closed-1", "rag"), dispatches=("sequential",), rounds=1
    )
    suite = SUITES["full"].narrowed(only)
    cases = [case for group in suite.groups for case in group.cases()]
    assert {(case.link, case.tokens, case.load, case.dispatch) for case in cases} == {
        ("1g", tokens, load, "sequential") for tokens in (32768, 65536) for load in ("closed-1", "rag")
    }
    assert suite.rounds == 1
    assert suite.arms == SUITES["full"].arms


def test_arms_may_be_others() -> None:
    assert SUITES["ci"].narrowed(Only(arms=("mooncake",))).arms == ("mooncake",)


def test_nothing_left_is_an_error_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"loads \('rga',\).*\n1g, 4096 tokens, closed-2, sequential"):
        SUITES["ci"].narrowed(Only(loads=("rga",)))
