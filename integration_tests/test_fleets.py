# SPDX-License-Identifier: Apache-2.0
"""What orchestrators of fleets send, replayed: one server's tokens, and the same bytes on both sides."""

from __future__ import annotations

from typing import Any

import pytest

from integration_tests.cluster import Cluster, new_prompt
from integration_tests.fleets import FLEETS, Fleet, PushingSidecar
from integration_tests.request_pair import TOKENS, Pair, Sent, ask, choices, completion


@pytest.fixture
def pair(cluster: Cluster) -> Pair:
    cluster.audit.write_text("")
    return Pair(cluster.prefill, cluster.decode_shm, cluster.prefill, cluster.bootstrap)


def chat() -> Sent:
    text = "".join(chr(97 + token % 26) for token in new_prompt(300))
    body = {
        "messages": [{"role": "user", "content": text}],
        "max_completion_tokens": TOKENS,
        "min_tokens": TOKENS,
    }
    return Sent("/v1/chat/completions", body, [])


def check(pair: Pair, cluster: Cluster, sent: Sent, answer: dict[str, Any]) -> None:
    records = cluster.audited(1)
    assert choices(answer) == choices(ask(pair.alone, sent.path, sent.body))
    assert len(choices(answer)[0]) == TOKENS
    assert {record["side"] for record in records} == {"producer", "consumer"}
    assert records[0]["sha256"] == records[1]["sha256"]


@pytest.mark.parametrize("kind", ["completion", "chat"])
@pytest.mark.parametrize("fleet", FLEETS, ids=lambda fleet: fleet.name)
def test_what_a_fleet_sends_is_handed_over(cluster: Cluster, pair: Pair, fleet: Fleet, kind: str) -> None:
    sent = chat() if kind == "chat" else completion(new_prompt(700))
    check(pair, cluster, sent, fleet.hand_over(pair, sent))


def test_llm_ds_push_mode_is_handed_over(cluster: Cluster, pair: Pair) -> None:
    sidecar = PushingSidecar()
    for sent in (
        completion(new_prompt(700)),
        completion(new_prompt(700)),
        chat(),
        completion(new_prompt(4000)),
    ):
        check(pair, cluster, sent, sidecar.hand_over(pair, sent))
