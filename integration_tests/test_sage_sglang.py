# SPDX-License-Identifier: Apache-2.0
"""SGLang behind InferenceBackend: a prefill and a decode engine, each an ``sglang.Engine`` in a process of its own.

Runs in SGLang's own environment (``make test-sglang``).
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from integration_tests.cluster import wait_until
from integration_tests.recall import MODEL, recall_prompt
from integration_tests.sage_engine import Engine
from sage_kv_connector.launch.process import core_halves
from sage_kv_connector.launch.sglang import ON_CPU

pytestmark = pytest.mark.skipif(find_spec("sglang") is None, reason="runs in SGLang's environment")

ENGINE = {
    "device": "cpu", "attention_backend": "torch_native", "disable_overlap_schedule": True,
    "dtype": "float32", "context_length": 2048, "max_total_tokens": 16384, "max_running_requests": 8,
    "page_size": 16, "disable_radix_cache": True, "skip_server_warmup": True,
}  # fmt: skip
TIMES = {"lease_s": 8, "deadline_s": 20, "peer_timeout_s": 15, "unmatched_timeout_s": 6}


class Pair(NamedTuple):
    prefill: Engine
    decode: Engine
    audit: Path
    prefill_log: Path


@pytest.fixture(scope="module")
def pair(scratch: Path, secret: dict[str, str]) -> Iterator[Pair]:
    audit = scratch / "audit-sage-sglang.jsonl"
    audit.touch()
    transport = {"host": "127.0.0.1", "audit_file": str(audit), **TIMES}
    # SGLang's default keeps retracted requests in memory that is registered with CUDA.
    roles = {"prefill": {}, "decode": {"disaggregation_decode_retraction_backup": "cpu_tensor"}}
    engines, logs = {}, {}
    for (role, options), cores in zip(roles.items(), core_halves(), strict=True):
        logs[role] = scratch / f"sage-sglang-{role}.log"
        env = {
            **os.environ, **secret, "HF_HUB_OFFLINE": "1", "SGLANG_USE_CPU_ENGINE": "1",
            "PYTHONPATH": str(ON_CPU),
            "SGLANG_CPU_OMP_THREADS_BIND": cores or ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        }  # fmt: skip
        with logs[role].open("w") as log:
            engines[role] = Engine("sglang", MODEL, transport, {"role": role, **ENGINE, **options}, env, log)
    try:
        for role, engine in engines.items():
            try:
                engine.ready()
            except AssertionError as error:
                raise AssertionError(logs[role].read_text()[-3000:]) from error
        yield Pair(engines["prefill"], engines["decode"], audit, logs["prefill"])
    finally:
        for engine in engines.values():
            engine.stop()


def audited(pair: Pair) -> list[dict[str, Any]]:
    """Both sides' records of one hand-over."""
    found: list[dict[str, Any]] = []

    def both_there() -> bool:
        found[:] = [json.loads(line) for line in pair.audit.read_text().splitlines()]
        return len(found) >= 2

    wait_until(both_there, 10.0, lambda: f"{len(found)} audit records of 2")
    pair.audit.write_text("")
    return found


@pytest.mark.parametrize("tokens", [96, 331, 1024])
def test_decode_continues_what_prefill_computed(pair: Pair, tokens: int) -> None:
    prompt, expected = recall_prompt(tokens, tokens)
    prefilled = pair.prefill.call("prefill", f"r{tokens}", prompt)
    assert prefilled[0] == f"r{tokens}" and prefilled[1] == prompt and prefilled[2] is None
    assert set(prefilled[3]) == {"bootstrap_host", "bootstrap_port", "bootstrap_room"}
    assert pair.decode.call("decode", prefilled, 8) == [f"r{tokens}", expected]
    records = audited(pair)
    assert {one["side"] for one in records} == {"producer", "consumer"}
    assert records[0]["sha256"] == records[1]["sha256"] and records[0]["nbytes"] > 0


def test_one_token_is_prefills(pair: Pair) -> None:
    prompt, expected = recall_prompt(3, 200)
    prefilled = pair.prefill.call("prefill", "one", prompt)
    assert pair.decode.call("decode", prefilled, 1) == ["one", expected[:1]]
    audited(pair)


def test_prompts_may_wait_and_be_decoded_in_any_order(pair: Pair) -> None:
    prompts = [recall_prompt(20 + seed, 300) for seed in range(4)]
    waiting = [pair.prefill.call("prefill", str(index), prompt) for index, (prompt, _) in enumerate(prompts)]
    for index in (2, 0, 3, 1):
        assert pair.decode.call("decode", waiting[index], 8) == [str(index), prompts[index][1]]
        audited(pair)


@pytest.mark.skipif(
    "SAGE_KVT_VLLM_SCRIPTS" not in os.environ, reason="wants vLLM's environment beside SGLang's"
)
def test_a_handover_is_good_for_the_other_engine(pair: Pair, scratch: Path, secret: dict[str, str]) -> None:
    transport = {"host": "127.0.0.1", "audit_file": str(pair.audit), **TIMES}
    engine = {
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 2048,
        "enable_prefix_caching": False,
    }
    env = {**os.environ, **secret, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1",
           "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # fmt: skip
    python = str(Path(os.environ["SAGE_KVT_VLLM_SCRIPTS"]) / "python")
    with (scratch / "sage-vllm.log").open("w") as log:
        vllm = Engine("vllm", MODEL, transport, engine, env, log, python)
    prompt, expected = recall_prompt(7, 700)
    try:
        vllm.ready()
        prefilled = vllm.call("prefill", "there", prompt)
        assert prefilled[2] == expected[0]
        assert pair.decode.call("decode", prefilled, 8) == ["there", expected]
        sent, received = audited(pair)
        assert sent["parts"] == received["parts"] and sent["parts"]
        assert vllm.call("decode", pair.prefill.call("prefill", "back", prompt), 8) == ["back", expected]
        sent, received = audited(pair)
        assert sent["parts"] == received["parts"] and sent["parts"]
        (registered,) = vllm.call("register_kv")
        assert pair.decode.call("transport_plan", registered)["reason"].startswith("groups[0].page_size")
        # A vLLM decode needs no first token: what its prefill offered of it is let go.
        assert vllm.call("decode", vllm.call("prefill", "again", prompt), 8) == ["again", expected]
        audited(pair)
    finally:
        vllm.stop()


def test_what_is_registered_and_planned(pair: Pair) -> None:
    (here,) = pair.prefill.call("register_kv")
    (there,) = pair.decode.call("register_kv")
    for engine_id, rank, schema, addresses, node in (here, there):
        assert rank == 0 and engine_id and node
        assert schema["engine"].startswith("sglang ") and schema["dtype"] == "fp32"
        assert schema["total_layers"] == 3 and schema["groups"][0]["page_size"] == 16
        assert {address.partition("://")[0] for address in addresses} == {"shm", "tcp"}
    assert here[0] != there[0]
    plan = pair.decode.call("transport_plan", here)
    assert plan["backend"] == "shm" and plan["wire_dtype"] == "same"
    other = [*here[:2], {**here[2], "head_dim": 80}, *here[3:]]
    assert "head_dim: 64 here, 80 at the peer" in pair.decode.call("transport_plan", other)["error"]


def test_wrong_calls_are_refused_by_name(pair: Pair) -> None:
    prompt, expected = recall_prompt(9, 200)
    assert "prompt is empty" in pair.prefill.call("prefill", "r", [])["error"]
    assert (
        "role is 'decode'; allowed for this method: prefill" in pair.decode.call("prefill", "r", [5])["error"]
    )
    assert "longer than the model's context length" in pair.prefill.call("prefill", "r", [5] * 3000)["error"]
    prefilled = pair.prefill.call("prefill", "r", prompt)
    assert (
        "role is 'prefill'; allowed for this method: decode"
        in (pair.prefill.call("decode", prefilled, 8)["error"])
    )
    for name, value in (("host", ""), ("port", 70000), ("port", "8998"), ("room", -1), ("room", None)):
        spoilt = [*prefilled[:3], {**prefilled[3], f"bootstrap_{name}": value}]
        assert f"handover.bootstrap_{name} is {value!r}" in pair.decode.call("decode", spoilt, 8)["error"]
    assert "max_tokens is 0" in pair.decode.call("decode", prefilled, 0)["error"]
    assert pair.decode.call("decode", prefilled, 8) == ["r", expected]
    audited(pair)


def test_a_prefill_that_fails_later_is_said_on_both_sides(pair: Pair) -> None:
    """Nobody fetches the KV within its lease: prefill gives it up and logs it, a late decode says why."""
    prompt, _ = recall_prompt(10, 300)
    prefilled = pair.prefill.call("prefill", "late", prompt)
    wait_until(
        lambda: "prefill of late failed" in pair.prefill_log.read_text(),
        3 * TIMES["lease_s"],
        lambda: pair.prefill_log.read_text()[-2000:],
    )
    begun = time.monotonic()
    error = pair.decode.call("decode", prefilled, 8)["error"]
    assert error.startswith("HandoverError: ") and "prefill gave the request up" in error, error
    assert time.monotonic() - begun < TIMES["deadline_s"]


def test_a_closed_engine_says_so_and_its_kv_is_gone(pair: Pair) -> None:
    """The last test: it closes both engines."""
    prompt, _ = recall_prompt(11, 300)
    prefilled = pair.prefill.call("prefill", "gone", prompt)
    for _ in range(2):
        assert pair.prefill.call("close") is None
    for method, arguments in (("prefill", ("r", [5])), ("register_kv", ())):
        assert "RuntimeError: this backend was closed" in pair.prefill.call(method, *arguments)["error"]
    error = pair.decode.call("decode", prefilled, 8)["error"]
    # Whichever decode notices first: the session's end, a refused connection, or the bootstrap server's.
    assert re.search(r"HandoverError: .*(lost|no session|refused|[Bb]ootstrap server)", error), error
    assert pair.decode.call("close") is None
