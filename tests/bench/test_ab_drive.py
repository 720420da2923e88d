# SPDX-License-Identifier: Apache-2.0
"""How requests are sent: by so many clients, at their times, each answer kept or its error; and how they are judged."""

from __future__ import annotations

import os
import random
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sage_kv_connector.bench.ab import drive as driving
from sage_kv_connector.bench.ab.drive import ANSWER_TOKENS, drive, judge
from sage_kv_connector.bench.ab.loads import Request
from sage_kv_connector.bench.server_pairs import ServerPair
from sage_kv_connector.launch.process import Process, ServerError
from sage_kv_connector.launch.vllm import Judged


class Pair(ServerPair):
    """Answers after a tenth of a second with the prompt's first token; fails prompts that begin with 0."""

    def __init__(self) -> None:
        server = Process("a pair", ["true"], 1, Path(os.devnull))
        super().__init__("a pair", server, server, None)
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()

    def sequential(self, prompt: list[int], max_tokens: int = 2) -> dict[str, Any]:
        with self._lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(0.1)
        with self._lock:
            self.at_once -= 1
        if prompt[0] == 0:
            raise ServerError("answered 500")
        return {"prefill_s": 0.04, "ttft_s": 0.06, "rest_s": 0.0, "token_ids": [prompt[0]] * max_tokens}


@pytest.mark.parametrize("clients", [1, 3])
def test_a_client_asks_when_it_was_answered(clients: int) -> None:
    pair = Pair()
    queues = [[Request([10 * client + number + 1]) for number in range(4)] for client in range(clients)]
    done = drive(pair, queues, "sequential")
    assert [one["token_ids"][0] for one in done] == [
        request.prompt[0] for queue in queues for request in queue
    ]
    assert pair.most_at_once == clients
    for before, after in pairwise(done[:4]):
        assert after["begun_s"] >= before["ended_s"]


def test_requests_of_an_open_load_come_at_their_times() -> None:
    done = drive(Pair(), [[Request([number + 1], number * 0.05)] for number in range(4)], "sequential")
    assert all(one["begun_s"] >= number * 0.05 for number, one in enumerate(done))
    assert done[3]["begun_s"] < done[0]["ended_s"] + 0.3


def test_an_error_is_kept_and_the_client_goes_on() -> None:
    done = drive(Pair(), [[Request([0]), Request([5])]], "sequential")
    assert done[0]["error"] == "answered 500" and done[0]["ended_s"] > done[0]["begun_s"]
    assert done[1]["token_ids"] == [5] * ANSWER_TOKENS and "error" not in done[1]


def test_a_judge_asks_one_server_about_answers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair()
    queues = [[Request([number % 6]) for number in range(12)]]
    done = drive(pair, queues, "sequential")
    warmed: list[int] = []

    def judged(_url: str, prompt: list[int], most: int) -> Judged:
        assert warmed[-1] == prompt[0]
        half = most // 2
        return Judged(
            [prompt[0]] * half + [prompt[0] if prompt[0] < 3 else 99] * (most - half), prompt[0] / 10
        )

    monkeypatch.setattr(driving, "complete", lambda _url, prompt, max_tokens: warmed.append(prompt[0]))
    monkeypatch.setattr(driving, "judged", judged)
    judge(pair, queues, done, 100, random.Random(0))
    for one in done:
        if "error" in one:
            assert "equal" not in one
        else:
            first = one["token_ids"][0]
            assert one["equal"] == (1.0 if first < 3 else 0.5) and one["sure"] == (first > 1)
    again = drive(pair, queues, "sequential")
    judge(pair, queues, again, 3, random.Random(0))
    assert sum("equal" in one for one in again) == 3
