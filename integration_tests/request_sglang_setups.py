# SPDX-License-Identifier: Apache-2.0
"""Pairs of real SGLang servers as people run them, alone and with vLLM, and which kinds of requests each is asked.

Runs in SGLang's own environment.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from integration_tests import request_cross
from integration_tests.cluster import bare_word
from integration_tests.recall import MODEL
from integration_tests.request_models import build_adapter
from integration_tests.request_pair import Row
from integration_tests.request_sglang import KINDS, SglangPair, run
from integration_tests.window_model import SERVERS_ENV
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.launch.process import core_halves, running
from sage_kv_connector.launch.sglang import (
    DECODE,
    PREFILL,
    SglangOptions,
    build_model,
    built_by,
    sglang_router,
    sglang_server,
)
from sage_kv_connector.launch.vllm import VllmOptions, vllm_server

TIMES = {"lease_s": 8, "deadline_s": 20, "peer_timeout_s": 15, "unmatched_timeout_s": 8}
COMMON = ("--dtype", "bfloat16", "--page-size", "16")
#: What shows that requests find their own KV, whatever way it takes.
FOUND = ("one prompt", "list of prompts", "n = 2, n = 5", "list of prompts, n = 2")


class Asked(NamedTuple):
    """One kind of request that a setup's servers are asked."""

    name: str
    row: Callable[[], Row]


def _asked(pair: SglangPair, way: str, kinds: Sequence[str]) -> list[Asked]:
    return [Asked(name, lambda name=name: run(pair, name, way)) for name in kinds]  # type: ignore[misc]


def _both_ways(pair: SglangPair, what: str, kinds: Sequence[str]) -> list[Asked]:
    by_hand = pair._replace(router=None)
    return _asked(pair, f"{what}, sglang-router", kinds) + _asked(by_hand, f"{what}, by hand", kinds)


@contextmanager
def _servers(
    options: SglangOptions, on_prefill: dict[str, Any] | None = None, on_decode: dict[str, Any] | None = None
) -> Iterator[SglangPair]:
    """``on_prefill``, ``on_decode``: how this server differs from the judge."""
    first, second = core_halves()
    prefill = sglang_server(
        "sglang-prefill", options, PREFILL, first, transport=dict(TIMES), **(on_prefill or {})
    )
    decode = sglang_server(
        "sglang-decode", options, DECODE, second, transport=dict(TIMES), **(on_decode or {})
    )
    alone = sglang_server("sglang-alone", options, None, second)
    router = sglang_router(prefill, decode, options.directory)
    with running(prefill, decode, alone), running(router):
        yield SglangPair(prefill, decode, alone, router)


@contextmanager
def plain(scratch: Path) -> Iterator[list[Asked]]:
    with _servers(SglangOptions(MODEL, scratch, 2048, 16384, COMMON)) as pair:
        yield _asked(pair, "sglang-router", [*KINDS])


@contextmanager
def lora(scratch: Path) -> Iterator[list[Asked]]:
    """Two adapters on each server."""
    model = build_model(scratch, "small")
    adapters = [f"{name}={build_adapter(scratch, name, seed)}" for seed, name in enumerate(("a", "b"))]
    extra = ("--dtype", "float32", "--page-size", "16", "--lora-backend", "torch_native", "--enable-lora",
             "--max-lora-rank", "8", "--lora-paths", *adapters)  # fmt: skip
    with _servers(SglangOptions(model, scratch, 2048, 16384, extra)) as pair:
        yield _both_ways(pair, "LoRA", ("each LoRA adapter",))


@contextmanager
def images(scratch: Path) -> Iterator[list[Asked]]:
    code = (
        "import sys; from pathlib import Path; from integration_tests.request_models import build_pixtral; "
        "print(build_pixtral(Path(sys.argv[1])))"
    )
    extra = ("--dtype", "float32", "--page-size", "16", "--enable-multimodal")
    with _servers(SglangOptions(built_by(code, str(scratch)), scratch, 2048, 16384, extra)) as pair:
        yield _both_ways(pair, "images", ("two images of one size",))


@contextmanager
def windows(scratch: Path) -> Iterator[list[Asked]]:
    """Every second layer has a sliding window, in a pool of its own; decode has larger pages."""
    code = (
        "import sys; from pathlib import Path; from integration_tests.window_model import build; "
        "build(Path(sys.argv[1])); print(sys.argv[1])"
    )
    model = built_by(code, str(scratch / "windows"))
    options = SglangOptions(model, scratch, 2048, 16384, ("--dtype", "float32"), SERVERS_ENV)
    sizes: list[dict[str, Any]] = [{"extra": ("--page-size", size)} for size in ("16", "32")]
    with _servers(options, *sizes) as pair:
        yield _both_ways(pair, "sliding windows", (*FOUND, "truncated on prefill"))


@contextmanager
def data_parallel(scratch: Path) -> Iterator[list[Asked]]:
    """Two engines on each side. The samples of a prompt must come to one engine of decode, too."""
    on_decode = {"dp_size": 2, "extra": ("--load-balance-method", "follow_bootstrap_room")}
    with _servers(SglangOptions(MODEL, scratch, 2048, 16384, COMMON), {"dp_size": 2}, on_decode) as pair:
        yield _both_ways(pair, "data parallel", FOUND)


@contextmanager
def stages(scratch: Path) -> Iterator[list[Asked]]:
    """Prefill has two pipeline stages, decode one."""
    with _servers(SglangOptions(MODEL, scratch, 2048, 16384, COMMON), {"pp_size": 2}) as pair:
        yield _both_ways(pair, "pipeline stages", FOUND)


@contextmanager
def cross(scratch: Path) -> Iterator[list[Asked]]:
    """vLLM and SGLang, each with a prefill and a decode; pages of other sizes on each side."""
    bootstrap_port = free_port()
    first, second = core_halves()
    vllm = vllm_server(
        "vllm",
        VllmOptions(
            MODEL, scratch, 2048, block_size=128, extra=("--dtype", "bfloat16", "--no-enable-prefix-caching"),
            scripts=Path(os.environ["SAGE_KVT_VLLM_SCRIPTS"]),
        ),
        bare_word(bootstrap_port=bootstrap_port),
        first,
    )  # fmt: skip
    options = SglangOptions(MODEL, scratch, 2048, 16384, ("--dtype", "bfloat16"))
    prefill = sglang_server(
        "sglang-prefill", options, PREFILL, first, transport=dict(TIMES), extra=("--page-size", "32")
    )
    decode = sglang_server(
        "sglang-decode", options, DECODE, second, transport=dict(TIMES),
        extra=("--page-size", "256", "--disable-radix-cache"),
    )  # fmt: skip
    with running(vllm, prefill, decode):
        pair = request_cross.CrossPair(vllm, bootstrap_port, prefill, decode)
        yield [
            Asked(name, lambda way=way, name=name: request_cross.run(pair, way, name))  # type: ignore[misc]
            for way, name in request_cross.KINDS
        ]


SETUPS: dict[str, Callable[[Path], AbstractContextManager[list[Asked]]]] = {
    "sglang": plain,
    "sglang_lora": lora,
    "sglang_images": images,
    "sglang_windows": windows,
    "sglang_data_parallel": data_parallel,
    "sglang_stages": stages,
    "cross": cross,
}
