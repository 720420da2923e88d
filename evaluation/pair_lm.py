# SPDX-License-Identifier: Apache-2.0
"""lm-eval's language model over a running pair: every score is what decode computes over KV that was handed over.

Log-likelihoods of a prompt are computed by prefill and never see that KV, so none is asked for. Continuations of one
token are scored by the log-probabilities of decode's first token. Longer ones decode is told to generate, and says what
it gave to each token.
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
        choices: dict[tuple[int, ...], list[int]] = {}
        for prompt, said in pairs:
            if len(said) == 1:
                choices.setdefault(tuple(prompt), []).append(said[0])
        first = {prompt: Question(prompt, wanted=tuple(wanted)) for prompt, wanted in choices.items()}
        longer = [Question(tuple(prompt), tuple(said)) for prompt, said in pairs if len(said) != 1]
        answers = self._answers.ask([*first.values(), *longer])
        scores = []
        for prompt, said in pairs:
            if len(said) == 1:
                (step,) = answers[first[tuple(prompt)]]
                scores.append((step.top[said[0]], step.token == said[0]))
            else:
                steps = answers[Question(tuple(prompt), tuple(said))]
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
