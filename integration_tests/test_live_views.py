# SPDX-License-Identifier: Apache-2.0
"""What an operator sees of real servers: ``sage-kvt top``, ``sage-kvt trace``, and log lines as JSON."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

from integration_tests.cluster import PREFILL_PARAMS, bare_word, new_prompt
from sage_kv_connector.launch.process import console_script, core_halves, running
from sage_kv_connector.launch.vllm import VllmOptions, complete, vllm_server
from sage_kv_connector.telemetry.reading import sources
from sage_kv_connector.telemetry.recording.publishing import DIRECTORY_ENV


def objects(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"time"')]


def of_event(log: Path, event: str) -> list[dict[str, Any]]:
    return [one for one in objects(log) if one["event"] == event]


def printed(*words: str) -> Any:
    said = subprocess.run([console_script("sage-kvt"), *words, "--json"], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout)


def test_transfers_are_seen_live_one_by_one_and_in_the_log(
    scratch: Path, model: Path, monkeypatch: Any
) -> None:
    place = scratch / "live-views"
    monkeypatch.setenv(DIRECTORY_ENV, str(place))
    env = {DIRECTORY_ENV: str(place), "VLLM_LOGGING_LEVEL": "DEBUG"}
    options = VllmOptions(model, scratch, 2048, extra=("--dtype", "float32"), env=env)
    given = bare_word(log_format="json")
    sides = zip(("prefill", "decode"), core_halves(), strict=True)
    prefill, decode = (vllm_server(f"live-{side}", options, given, cores) for side, cores in sides)
    with running(prefill, decode):
        prompts = [new_prompt(300) for _ in range(2)]
        first, unfetched = (
            complete(prefill.url, prompt, max_tokens=1, kv_transfer_params=PREFILL_PARAMS, stream=False)
            for prompt in prompts
        )
        assert complete(
            decode.url, prompts[0], max_tokens=4, kv_transfer_params=first.kv_transfer_params
        ).token_ids
        until = time.monotonic() + 60
        while not of_event(prefill.log, "failure"):
            assert time.monotonic() < until, "the second prefill's lease did not end"
            time.sleep(0.5)
        shown = printed("top")
        snapshot = scratch / "live-snapshot.json"
        snapshot.write_bytes(sources.body_of(sources.local()))
        (sent,) = of_event(prefill.log, "transfer")
        (landed,) = of_event(decode.log, "transfer")
        way = printed("trace", str(snapshot), "--transfer", sent["transfer"])
    assert len(shown["engines"]) == 2 and not shown["silent"]
    ended = {(one["record"]["side"], one["record"]["code"]) for one in shown["transfers"]}
    assert ended == {("prefill", "ok"), ("decode", "ok"), ("prefill", "expired")}
    assert [step["name"] for step in way["steps"] if step["depth"] == 0] == ["decode", "prefill"]
    for line, side in ((sent, "prefill"), (landed, "decode")):
        assert (line["level"], line["side"], line["code"]) == ("debug", side, "ok")
        assert line["bytes"] > 0 and line["seconds"] > 0 and line["stages"]["wire"] >= 0 and line["peer"]
    assert sent["bytes"] == landed["bytes"] and sent["request"] != landed["request"]
    (failure,) = of_event(prefill.log, "failure")
    assert (failure["level"], failure["code"], failure["stage"]) == ("warning", "expired", "hold")
    assert unfetched.kv_transfer_params is not None
    for log in (prefill.log, decode.log):
        text = log.read_text()
        assert "Starting vLLM server" in text or "Started server process" in text, "vLLM's own lines stay"
        ours = [line for line in text.splitlines() if "KV of request" in line]
        assert ours and all(line.startswith('{"time"') for line in ours), "none of ours is told twice"
