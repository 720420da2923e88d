# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from evaluation.answers import Answers, Question, State, Void, check
from evaluation.pair import NOTHING, Counts, Pair, Step


class PlannedPair(Pair):
    """Hands everything over but ``lost`` tokens of each prompt."""

    def __init__(self, lost: int = 0) -> None:
        self.lost, self.asked = lost, 0
        self._counts = NOTHING

    def hand_over(
        self,
        prompt: Sequence[int],
        *,
        forced: Sequence[int] = (),
        tokens: int = 1,
        stop: Sequence[int] = (),
        wanted: Sequence[int] = (),
    ) -> list[Step]:
        self.asked += 1
        came = Counts(1, len(prompt) - self.lost, 100, 200, self.lost, int(self.lost > 0))
        self._counts = Counts(*(a + b for a, b in zip(self._counts, came, strict=True)))
        return [Step(sum(prompt), -0.123456789, {1: -0.5})]

    def counts(self) -> Counts:
        return self._counts


def asked(pair: PlannedPair, state: State, run: str = "model, arm") -> Answers:
    @contextmanager
    def start() -> Iterator[Pair]:
        yield pair

    return Answers(run, start, state)


QUESTIONS = [Question((1, 2, 3)), Question((4, 5))]


def test_a_run_goes_on_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "state.jsonl"
    with asked(PlannedPair(), State(path)) as answers:
        first = answers.ask(QUESTIONS)
    again = PlannedPair()
    with asked(again, State(path)) as answers:
        new = Question((9,))
        assert answers.ask([*QUESTIONS, new])[new][0].token == 9
        assert again.asked == 1, "only what is new is asked"
        assert answers.counts == Counts(3, 6, 300, 600, 0, 0)
        assert [step.token for step in answers.ask(QUESTIONS)[QUESTIONS[0]]] == [first[QUESTIONS[0]][0].token]
    other = PlannedPair()
    with asked(other, State(path), "model, another arm") as answers:
        answers.ask(QUESTIONS)
    assert other.asked == 2


def test_a_line_that_was_not_written_to_its_end_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "state.jsonl"
    with asked(PlannedPair(), State(path)) as answers:
        answers.ask(QUESTIONS[:1])
    path.write_text(path.read_text() + '{"run": "model, arm", "key": "abc", "st')
    assert len(State(path).lines) == 2


def test_what_decode_computed_itself_is_void_and_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "state.jsonl"
    with (
        asked(PlannedPair(lost=2), State(path)) as answers,
        pytest.raises(Void, match="4 tokens of 2 failed"),
    ):
        answers.ask(QUESTIONS)
    assert not path.exists()


@pytest.mark.parametrize(("tokens", "right"), [(5, True), (3, True), (4, False), (2, False), (6, False)])
def test_all_tokens_came_or_all_but_the_last_of_each_prompt(tokens: int, right: bool) -> None:
    counts = Counts(2, tokens, 100, 200, 0, 0)
    if right:
        check(counts, QUESTIONS)
    else:
        with pytest.raises(
            Void, match=f"2 hand-overs with {tokens} tokens were counted, must be 2 with 5, or with 3"
        ):
            check(counts, QUESTIONS)


def test_questions_that_differ_have_other_keys() -> None:
    prompt = Question((1, 2))
    questions = [prompt, Question((1,), (2,)), prompt._replace(tokens=2), prompt._replace(stop=(2,))]
    questions.append(prompt._replace(wanted=(2,)))
    assert len({question.key for question in questions}) == len(questions)
