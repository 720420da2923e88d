# SPDX-License-Identifier: Apache-2.0
"""Answers of one pair: asked for once, kept in a file, and only where all of their KV really was handed over."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.pair import AT_ONCE, NOTHING, Counts, Pair, Step
from sage_kv_connector.console import progress, seconds_text

#: Questions asked between two looks at the counters.
BLOCK = 48
#: Log-probabilities are kept to so many digits.
DIGITS = 5


class Void(RuntimeError):
    """Decode computed KV that it should have been handed."""


class Question(NamedTuple):
    """A prompt; decode's tokens are ``forced``, or up to ``tokens`` greedy ones before one of ``stop``.

    ``wanted``: tokens whose log-probabilities are asked for; without, those of the most likely ones come.
    """

    prompt: tuple[int, ...]
    forced: tuple[int, ...] = ()
    tokens: int = 1
    stop: tuple[int, ...] = ()
    wanted: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()[:24]


class State:
    """A file of JSON lines, each with the ``run`` that it belongs to; without a path nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.lines: list[dict[str, Any]] = []
        if path is not None and path.exists():
            self.lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]

    def add(self, lines: Iterable[dict[str, Any]]) -> None:
        new = list(lines)
        self.lines += new
        if self._path is not None:
            with self._path.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in new)


class Answers:
    """``run``: names model and arm. ``start``: starts the pair, when the first answer is missing."""

    def __init__(self, run: str, start: Callable[[], AbstractContextManager[Pair]], state: State) -> None:
        self._run, self._start, self._state = run, start, state
        self._pair: Pair | None = None
        self._stack = ExitStack()
        self._known: dict[str, list[Step]] = {}
        #: What was counted while these answers were got, now and in earlier runs.
        self.counts = NOTHING
        for line in state.lines:
            if line["run"] == run and "counts" in line:
                self._add(Counts(**line["counts"]))
            elif line["run"] == run:
                self._known[line["key"]] = [_step(step) for step in line["steps"]]

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def ask(self, questions: Iterable[Question]) -> dict[Question, list[Step]]:
        """Each question's steps. Raises ServerError, and Void where not all KV was handed over."""
        wanted = list(dict.fromkeys(questions))
        missing = [question for question in wanted if question.key not in self._known]
        # vLLM 0.32 gives a whole batch the log-probabilities of wanted tokens where one request has such.
        kinds = [[q for q in missing if q.wanted], [q for q in missing if not q.wanted]]
        blocks = [kind[first : first + BLOCK] for kind in kinds for first in range(0, len(kind), BLOCK)]
        begun, done = time.monotonic(), 0
        for block in blocks:
            self._ask_block(block)
            done += len(block)
            left = (time.monotonic() - begun) / done * (len(missing) - done)
            rest = f", about {seconds_text(left)} left" if left else ""
            progress.print(f"{self._run}: {done} of {len(missing)} answers{rest}")
        return {question: self._known[question.key] for question in wanted}

    def _ask_block(self, questions: list[Question]) -> None:
        if self._pair is None:
            self._pair = self._stack.enter_context(self._start())
        pair, before = self._pair, self._pair.counts()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            steps = list(pool.map(lambda question: _hand_over(pair, question), questions))
        counts = pair.counted(before, len(questions))
        check(counts, questions)
        self._add(counts)
        self._known |= {question.key: each for question, each in zip(questions, steps, strict=True)}
        lines = [
            {"run": self._run, "key": question.key, "steps": [_line(step) for step in each]}
            for question, each in zip(questions, steps, strict=True)
        ]
        self._state.add([*lines, {"run": self._run, "counts": counts._asdict()}])

    def _add(self, counts: Counts) -> None:
        self.counts = Counts(*(a + b for a, b in zip(self.counts, counts, strict=True)))


def check(counts: Counts, questions: list[Question]) -> None:
    """Raises Void unless every token of every prompt came from prefill.

    Where a layer has a window, prefill leaves each prompt's last token to decode, which computes it anyway: then all
    but one of each came.
    """
    if counts.recomputed_tokens or counts.failed_loads:
        raise Void(
            f"decode computed {counts.recomputed_tokens} tokens of {counts.failed_loads} failed hand-overs itself"
        )
    asked = len(questions)
    tokens = sum(len(question.prompt) for question in questions)
    if counts.hand_overs != asked or counts.tokens not in (tokens, tokens - asked):
        counted = f"{counts.hand_overs} hand-overs with {counts.tokens} tokens were counted"
        raise Void(f"{counted}, must be {asked} with {tokens}, or with {tokens - asked}")


def _hand_over(pair: Pair, question: Question) -> list[Step]:
    asked = question._asdict()
    return pair.hand_over(asked.pop("prompt"), **asked)


def _line(step: Step) -> list[Any]:
    top = {str(token): round(value, DIGITS) for token, value in step.top.items()}
    return [step.token, round(step.logprob, DIGITS), top]


def _step(line: list[Any]) -> Step:
    return Step(line[0], line[1], {int(token): value for token, value in line[2].items()})
