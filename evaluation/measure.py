# SPDX-License-Identifier: Apache-2.0
"""One arm of one model: scores of every task's items, and of the tokens that follow passages."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from evaluation import items
from evaluation.answers import Answers, Question, State, Void
from evaluation.arms import arm as arm_of
from evaluation.models import Model, converted, first_tokens
from evaluation.pair import NOTHING, Counts, Pairs

TASKS = ("boolq", "commonsense_qa", "openbookqa", "ruler_niah")
#: Tasks whose items take several hand-overs each, so that half of them are asked.
COSTLY = ("openbookqa",)
TASK_FILES = Path(__file__).resolve().parent / "tasks"
#: Tokens handed over before each passage's continuation, in turn, and of the continuation.
PREFIXES = (384, 640, 1024)
CONTINUATION = 32
GENERATED = 64  #: room that prompts leave to what decode adds


@dataclass(frozen=True)
class Amount:
    """How much is asked. ``questions``: items of each task of questions, half of it where one takes several hand-overs.

    ``needles``: RULER's prompts, of ``needle_tokens`` tokens. ``passages``: whose continuations are scored, whichever
    ``tasks`` are asked.
    """

    questions: int
    needles: int
    needle_tokens: int
    passages: int
    tasks: tuple[str, ...] = TASKS

    def part(self, of: int) -> Amount:
        """The same, but the first 1/``of`` of the items."""
        return Amount(
            math.ceil(self.questions / of),
            math.ceil(self.needles / of),
            self.needle_tokens,
            math.ceil(self.passages / of),
            self.tasks,
        )


@dataclass
class Measured:
    """Scores of one arm. ``scores``, ``probabilities``: by task, an item each: its metric, and the share of the right
    choice among the choices. ``continuations``: a passage each: log-probabilities of its tokens. ``tops``: of each of
    these the most likely tokens. ``counts``: of its hand-overs. ``void``: why it says nothing."""

    model: str
    arm: str
    scores: dict[str, list[float]] = field(default_factory=dict)
    probabilities: dict[str, list[float]] = field(default_factory=dict)
    continuations: list[list[float]] = field(default_factory=list)
    tops: list[list[dict[int, float]]] = field(default_factory=list)
    counts: Counts = NOTHING
    void: str = ""


def measure(model: Model, name: str, amount: Amount, state: State, pairs: Pairs, directory: Path) -> Measured:
    """``directory``: takes the items. Raises ServerError where a server does not start or ends."""
    from transformers import AutoConfig, AutoTokenizer

    from evaluation.pair_lm import PairLM

    folder = converted(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    arm = arm_of(name, AutoConfig.from_pretrained(folder).num_hidden_layers)
    most = max(amount.needle_tokens, PREFIXES[-1] + CONTINUATION) + GENERATED
    measured = Measured(model.name, name)

    def start() -> Any:
        return pairs.pair(arm, folder, most)

    with Answers(f"{model.name}, {name}", start, state) as answers:
        lm = PairLM(answers, tokenizer, first_tokens(model, tokenizer))
        try:
            _follow(measured, answers, lm, amount.passages)
            for task in amount.tasks:
                _score(measured, lm, task, amount, folder, directory)
        except Void as void:
            measured.void = str(void)
        measured.counts = answers.counts
    return measured


def _follow(measured: Measured, answers: Answers, lm: Any, count: int) -> None:
    """Score what follows ``count`` passages; those that are too short are put together."""
    stories, questions = items.passages(), []
    for prefix in itertools.islice(itertools.cycle(PREFIXES), count):
        text = next(stories)
        while len(tokens := lm.tokens(text)) < prefix + CONTINUATION:
            text += "\n\n" + next(stories)
        questions.append(Question(tuple(tokens[:prefix]), tuple(tokens[prefix : prefix + CONTINUATION])))
    told = answers.ask(questions)
    measured.continuations = [[step.logprob for step in told[question]] for question in questions]
    measured.tops = [[step.top for step in told[question]] for question in questions]


def _score(measured: Measured, lm: Any, task: str, amount: Amount, folder: Path, directory: Path) -> None:
    os.environ["HF_DATASETS_CACHE"] = str(directory / "datasets")
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    import lm_eval

    config = yaml.safe_load((TASK_FILES / f"{task}.yaml").read_text())
    if task == "ruler_niah":
        made = items.needles(folder, amount.needle_tokens, amount.needles, directory)
        config["process_results"] = _found
        given = {"test": made}
    else:
        made, count = items.questions(task), math.ceil(amount.questions / (2 if task in COSTLY else 1))
        given = {"examples": made[: items.EXAMPLES], "test": made[items.EXAMPLES :][:count]}
    files = {
        split: str(items.write(part, directory / f"{measured.model}-{task}-{split}.jsonl"))
        for split, part in given.items()
        if part
    }
    if not given["test"]:
        return
    done = lm_eval.simple_evaluate(
        model=lm, tasks=[config | {"dataset_kwargs": {"data_files": files}}], bootstrap_iters=0
    )
    samples = sorted(done["samples"][task], key=lambda sample: int(sample["doc_id"]))
    metric = config["metric_list"][0]["metric"]
    measured.scores[task] = [float(sample[metric]) for sample in samples]
    if config["output_type"] == "multiple_choice":
        measured.probabilities[task] = [
            right_share([float(said[0]) for said in sample["filtered_resps"]], int(sample["doc"]["gold"]))
            for sample in samples
        ]


def right_share(logprobs: Sequence[float], right: int) -> float:
    """The probability of the right one among the choices."""
    most = max(logprobs)
    parts = [math.exp(value - most) for value in logprobs]
    return parts[right] / sum(parts)


def _found(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"acc": float(str(doc["gold"]) in results[0])}
