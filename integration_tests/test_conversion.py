# SPDX-License-Identifier: Apache-2.0
"""Any prefill to any decode, with a model whose answer depends on its context.

Where only the layout differs (page size, tensor parallel size) the elements on both sides are
the same and so are the tokens. Where elements are converted, the recalled tokens are counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, cast

import pytest

from integration_tests.cluster import TIMES
from integration_tests.recall import MODEL, recall_prompt
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.launch.process import Process, core_halves, running
from sage_kv_connector.launch.vllm import VllmOptions, complete, router, vllm_server

LENGTHS = (331, 700, 1024)
#: vLLM 0.32 refuses an fp8 cache on a CPU with neither.
fp8_cache = pytest.mark.skipif(
    not {"avx512f", "amx_tile"} & set(Path("/proc/cpuinfo").read_text().split()),
    reason="vLLM keeps an fp8 cache only on CPUs with AVX-512 or AMX",
)
MAX_MODEL_LEN = 2048


class Prefill(NamedTuple):
    """One prefill server, asked by many decode servers."""

    process: Process
    bootstrap_port: int
    audit: Path
    scratch: Path
    secret: dict[str, str]
    prompts: list[tuple[list[int], list[int]]]
    alone: list[list[int]]


def options(scratch: Path, secret: dict[str, str], *extra: str, block_size: int | None = None) -> VllmOptions:
    return VllmOptions(
        MODEL,
        scratch,
        MAX_MODEL_LEN,
        block_size=block_size,
        extra=(
            "--dtype",
            "bfloat16",
            "--max-num-batched-tokens",
            "2048",
            "--no-enable-prefix-caching",
            *extra,
        ),
        env=secret,
    )


def words(audit: Path, **more: object) -> str:
    given = {"host": "127.0.0.1", "audit_file": audit, **TIMES, **more}
    return "sage_kvt:" + ",".join(f"{key}={value}" for key, value in given.items())


@pytest.fixture(scope="module")
def prefill(scratch: Path, secret: dict[str, str]) -> Iterator[Prefill]:
    audit, bootstrap = scratch / "audit-conversion.jsonl", free_port()
    audit.touch()
    process = vllm_server(
        "prefill-recall",
        options(scratch, secret, block_size=128),
        words(audit, bootstrap_port=bootstrap),
        core_halves()[0],
    )
    prompts = [recall_prompt(seed, tokens) for seed, tokens in enumerate(LENGTHS)]
    with running(process):
        alone = [complete(process.url, prompt, max_tokens=8).token_ids for prompt, _ in prompts]
        assert alone == [expected for _, expected in prompts], "the model recalls what its context says"
        yield Prefill(process, bootstrap, audit, scratch, secret, prompts, alone)


class Handed(NamedTuple):
    """What came of handing every prompt over in both ways of dispatch."""

    tokens: list[list[int]]
    records: list[dict[str, object]]


def parts_of(records: list[dict[str, object]]) -> list[str]:
    """Every converted part with the digest of its elements, over all ranks."""
    found = sorted(part for record in records for part in cast(list[str], record["parts"]))
    assert found
    return found


def hand_over(prefill: Prefill, decode: Process, log: Path) -> Handed:
    concurrent = router(prefill.process, decode, prefill.scratch)
    sequential = router(
        prefill.process,
        decode,
        prefill.scratch,
        dispatch="sequential",
        bootstrap_port=prefill.bootstrap_port,
    )
    before = len(prefill.audit.read_text().splitlines())
    with running(decode), running(sequential, concurrent):
        tokens = [
            complete(front.url, prompt, max_tokens=8).token_ids
            for front in (sequential, concurrent)
            for prompt, _ in prefill.prompts
        ]
    records = [json.loads(line) for line in prefill.audit.read_text().splitlines()[before:]]
    assert "did not arrive" not in log.read_text(), "a hand-over failed and was recomputed"
    return Handed(tokens, records)


def decode_server(
    prefill: Prefill, name: str, *extra: str, block_size: int = 128, **config: object
) -> Process:
    chosen = options(prefill.scratch, prefill.secret, *extra, block_size=block_size)
    return vllm_server(name, chosen, words(prefill.audit, **config), core_halves()[1])


@pytest.mark.parametrize(
    ("name", "block_size", "extra"),
    [
        pytest.param("page-64", 64, (), marks=pytest.mark.full),
        pytest.param("page-96", 96, (), marks=pytest.mark.full),
        ("tp-2", 128, ("--tensor-parallel-size", "2")),
        pytest.param("page-32-tp-2", 32, ("--tensor-parallel-size", "2"), marks=pytest.mark.full),
    ],
)
def test_another_page_size_or_tp_size_changes_no_element(
    prefill: Prefill, name: str, block_size: int, extra: tuple[str, ...]
) -> None:
    decode = decode_server(prefill, f"decode-{name}", *extra, block_size=block_size)
    handed = hand_over(prefill, decode, decode.log)
    assert handed.tokens == prefill.alone * 2
    consumers = [r for r in handed.records if r["side"] == "consumer"]
    producers = [r for r in handed.records if r["side"] == "producer"]
    ranks = 2 if "tp" in name else 1
    assert len(consumers) == ranks * len(handed.tokens) and {r["wire_dtype"] for r in consumers} == {"bf16"}
    assert parts_of(consumers) == parts_of(producers)


@pytest.mark.parametrize(
    ("name", "extra", "config"),
    [
        pytest.param("fp8-cache", ("--kv-cache-dtype", "fp8"), {}, marks=[fp8_cache, pytest.mark.full]),
        ("fp8-wire", (), {"target_dtype": "fp8_e4m3", "backend": "tcp"}),
        pytest.param("int4-wire", (), {"target_dtype": "int4", "backend": "tcp"}, marks=pytest.mark.full),
        pytest.param(
            "int4-wire-fp8-cache-page-64",
            ("--kv-cache-dtype", "fp8"),
            {"target_dtype": "int4"},
            marks=fp8_cache,
        ),
    ],
)
def test_converted_elements_still_recall(
    prefill: Prefill, name: str, extra: tuple[str, ...], config: dict[str, object]
) -> None:
    decode = decode_server(
        prefill, f"decode-{name}", *extra, block_size=64 if "64" in name else 128, **config
    )
    handed = hand_over(prefill, decode, decode.log)
    expected = [token for answer in prefill.alone * 2 for token in answer]
    got = [token for answer in handed.tokens for token in answer]
    agreement = sum(a == b for a, b in zip(got, expected, strict=True)) / len(expected)
    print(f"{name}: {agreement:.3f} of the greedy tokens agree with the exact cache")
    assert agreement >= (0.75 if "int4" in name else 0.95)
    wire = {r["wire_dtype"] for r in handed.records}
    assert wire == {config.get("target_dtype", "fp8_e4m3")}


@contextmanager
def prefill_of(
    scratch: Path, secret: dict[str, str], name: str, *extra: str, block_size: int
) -> Iterator[Prefill]:
    """A prefill server for one decode server."""
    audit, bootstrap = scratch / f"audit-{name}.jsonl", free_port()
    audit.touch()
    process = vllm_server(
        f"prefill-{name}",
        options(scratch, secret, *extra, block_size=block_size),
        words(audit, bootstrap_port=bootstrap),
        core_halves()[0],
    )
    prompts = [recall_prompt(seed, tokens) for seed, tokens in enumerate(LENGTHS)]
    with running(process):
        alone = [complete(process.url, prompt, max_tokens=8).token_ids for prompt, _ in prompts]
        yield Prefill(process, bootstrap, audit, scratch, secret, prompts, alone)


@pytest.mark.parametrize(
    ("name", "block_size", "extra"),
    [
        pytest.param("smaller-pages", 96, (), marks=pytest.mark.full),
        pytest.param("tp-2-page-64", 64, ("--tensor-parallel-size", "2"), marks=pytest.mark.full),
    ],
)
def test_smaller_pages_and_more_ranks_of_prefill_change_no_element(
    scratch: Path, secret: dict[str, str], name: str, block_size: int, extra: tuple[str, ...]
) -> None:
    with prefill_of(scratch, secret, name, *extra, block_size=block_size) as source:
        decode = decode_server(source, f"decode-of-{name}", block_size=128)
        handed = hand_over(source, decode, decode.log)
    assert handed.tokens == [expected for _, expected in source.prompts] * 2
    consumers = [r for r in handed.records if r["side"] == "consumer"]
    producers = [r for r in handed.records if r["side"] == "producer"]
    assert {r["wire_dtype"] for r in consumers} == {"bf16"}
    assert len({r["rank"] for r in producers}) == (2 if extra else 1)
    assert parts_of(consumers) == parts_of(producers)


@fp8_cache
@pytest.mark.full
def test_tp_2_and_an_fp8_prefill_hand_over_to_tp_1_in_bf16(scratch: Path, secret: dict[str, str]) -> None:
    extra = ("--tensor-parallel-size", "2", "--kv-cache-dtype", "fp8")
    with prefill_of(scratch, secret, "tp2-fp8", *extra, block_size=96) as source:
        decode = decode_server(source, "decode-tp1-of-tp2", block_size=64)
        handed = hand_over(source, decode, decode.log)
    agree = [
        a == b
        for one, two in zip(handed.tokens, source.alone * 2, strict=True)
        for a, b in zip(one, two, strict=True)
    ]
    assert sum(agree) / len(agree) >= 0.95
    assert len({r["rank"] for r in handed.records if r["side"] == "producer"}) == 2
