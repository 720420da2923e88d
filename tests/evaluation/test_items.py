# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluation import arms, items, models
from evaluation.pair import cpu_flags

QUESTION = {
    "question": "Where is money kept?",
    "answer": "B. bank vault",
    "options": "\nA. river\nB. bank vault\nC. mall",
}


def test_a_lettered_question_has_its_choices_without_letters() -> None:
    assert items.lettered(QUESTION) == {
        "query": "Question: Where is money kept?\nAnswer:",
        "choices": ["river", "bank vault", "mall"],
        "gold": 1,
    }
    assert items.lettered(QUESTION | {"answer": "B. something else"}) is None


@pytest.mark.parametrize("stray", [".", "D.", "D. ", "mall"])
def test_a_question_with_a_line_that_is_no_option_is_left_out(stray: str) -> None:
    line = QUESTION | {"options": f"{stray}\n{QUESTION['options'].strip()}"}
    assert items.lettered(line) is None
    assert items.first_words(line) is None


def test_choices_that_begin_alike_cannot_be_told_by_their_first_words() -> None:
    found = items.first_words(QUESTION)
    assert found is not None and found["choices"] == ["river", "bank", "mall"] and found["gold"] == 1
    assert items.first_words(QUESTION | {"options": "A. bank robber\nB. bank vault"}) is None


def test_boolq_answers_no_or_yes_and_leaves_long_passages_out() -> None:
    line = {"question": "is water wet", "passage": "Water is wet.", "answer": "True"}
    found = items.boolq(line)
    assert found is not None and found["choices"][found["gold"]] == "yes"
    assert items.boolq(line | {"passage": "w" * (items.BOOLQ_MOST_CHARACTERS + 1)}) is None


def test_items_are_json_lines(tmp_path: Path) -> None:
    path = items.write([{"gold": 1}, {"gold": 0}], tmp_path / "items.jsonl")
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"gold": 1}, {"gold": 0}]


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(ImportError, match=r"x\.gguf of package no_such_package"):
        models.package_file("no_such_package", "x.gguf")


@pytest.mark.parametrize("name", [*arms.FORMATS, arms.MIXED, *arms.CONTROLS, *arms.CONSIDERED])
def test_every_arm_says_whether_it_is_emulated(name: str) -> None:
    arm = arms.arm(name, 30)
    assert arm.emulated == (name not in arms.FORMATS and name != "bf16 to fp8 cache")
    assert arm.target_dtype == (name if name in arms.FORMATS else arm.target_dtype)


def test_this_cpu_says_what_it_can_do() -> None:
    assert cpu_flags() & {"sse2", "asimd", "fp"}
