# SPDX-License-Identifier: Apache-2.0
"""lm-eval's language model over a running pair: every score is what decode computes over KV that was handed over.

Log-likelihoods of a prompt are computed by prefill and never see that KV, so none is asked for. A continuation of one
token is looked up among the log-probabilities of decode's first token; where it is not one of the most likely, and for
longer ones, decode is told to generate it, and says what it gave to each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM

from evaluation.answers import Answers, Question


class PairLM(LM):  # type: ignore[misc]
    """``first``: tokens that every text begins with."""

    def __init__(self, answers: Answers, tokenizer: Any, first: Sequence[int]) -> None:
        super().__init__()
        self._answers, self._tokenizer, self._first = answers, tokenizer, list(first)

    @property
    def tokenizer_name(self) -> str:
        return str(self._tokenizer.name_or_path)

    def tokens(self, text: str) -> list[int]:
        return [*self._first, *self._tokenizer(text, add_special_tokens=False).input_ids]

    def split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both, cut where the context alone ends; its last blanks belong to the continuation."""
        blanks = len(context) - len(context.rstrip())
        if blanks:
            context, continuation = context[:-blanks], context[-blanks:] + continuation
        whole, prompt = self.tokens(context + continuation), self.tokens(context)
        return prompt, whole[len(prompt) :]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log-probability, would greedy decoding say it) of each (context, continuation). Raises ServerError."""
        pairs = [self.split(*request.args) for request in requests]
        first = self._answers.ask([Question(tuple(prompt)) for prompt, said in pairs if len(said) == 1])
        longer = [
            Question(tuple(prompt), tuple(said))
            for prompt, said in pairs
            if len(said) != 1 or said[0] not in first[Question(tuple(prompt))][0].top
        ]
        told = self._answers.ask(longer)
        scores = []
        for prompt, said in pairs:
            steps = told.get(Question(tuple(prompt), tuple(said)))
            if steps is None:
                step = first[Question(tuple(prompt))][0]
                scores.append((step.top[said[0]], step.token == said[0]))
            else:
                greedy = all(step.logprob >= max(step.top.values()) for step in steps)
                scores.append((sum(step.logprob for step in steps), greedy))
        return scores

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy text of each (context, options), before the first of ``until``. Raises ServerError."""
        stop = (self._tokenizer.eos_token_id,)
        questions = [
            Question(tuple(self.tokens(context)), tokens=options["max_gen_toks"], stop=stop)
            for context, options in (request.args for request in requests)
        ]
        answers = self._answers.ask(questions)
        texts = []
        for question, request in zip(questions, requests, strict=True):
            text = self._tokenizer.decode(
                [step.token for step in answers[question]], skip_special_tokens=True
            )
            for mark in request.args[1].get("until") or []:
                text = text.split(mark)[0] if text.strip(mark) != "" else text
            texts.append(text)
        return texts

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Raises NotImplementedError: prefill computes it."""
        raise NotImplementedError(
            "a text's own log-likelihood is computed by prefill and sees no KV of another"
        )
