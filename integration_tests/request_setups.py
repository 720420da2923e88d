# SPDX-License-Identifier: Apache-2.0
"""Pairs of real vLLM servers as people run them, and which kinds of requests each is asked."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from integration_tests.cluster import TIMES, bare_word, learn
from integration_tests.request_kinds import KINDS
from integration_tests.request_models import (
    build_adapter,
    build_draft,
    build_multi_token_model,
    build_vision_model,
)
from integration_tests.request_pair import CHAT_TEMPLATE, Pair
from sage_kv_connector.config import SECRET_ENV
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.launch.process import Process, core_halves, running
from sage_kv_connector.launch.tiny_model import build
from sage_kv_connector.launch.vllm import VllmOptions, router, vllm_server

#: What shows that a transfer is bound to its prompt, whatever way it takes.
BOUND = ("one prompt", "list of prompts", "n = 3", "another prompt's parameters", "another cache salt")


class Way(NamedTuple):
    """A pair, the name of its way in the table, and the kinds that it is asked.

    ``spread``: what handles a request of several prompts gives them to several engines, and answers with the
    parameters of one.
    """

    name: str
    pair: Pair
    kinds: Sequence[str]
    spread: bool = False


class Workshop:
    """Where servers of one run get what they have in common."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.model = build(scratch, "small")
        self.first, self.second = core_halves()
        self.options = VllmOptions(
            self.model,
            scratch,
            4096,
            extra=("--dtype", "float32", "--chat-template", CHAT_TEMPLATE),
            env={SECRET_ENV: secrets.token_urlsafe(16), "VLLM_SERVER_DEV_MODE": "1"},
        )

    def with_extra(self, *extra: str, options: VllmOptions | None = None) -> VllmOptions:
        options = options or self.options
        return dataclasses.replace(options, extra=(*options.extra, *extra))

    @contextmanager
    def pair(
        self,
        prefill: VllmOptions,
        decode: VllmOptions,
        alone: VllmOptions | None = None,
        *,
        on_prefill: Callable[[int], Any] = lambda port: f"{bare_word()},bootstrap_port={port}",
        on_decode: Any = None,
        more: Sequence[Process] = (),
    ) -> Iterator[Pair]:
        """``on_prefill``: what prefill is started with, given the port of its bootstrap server."""
        port = free_port()
        first = vllm_server("prefill", prefill, on_prefill(port), self.first)
        second = vllm_server("decode", decode, on_decode or bare_word(), self.second)
        judge = vllm_server("alone", alone or prefill, None, self.second)
        with running(first, second, judge, *more):
            yield Pair(first, second, judge, f"http://127.0.0.1:{port}")


@contextmanager
def plain(shop: Workshop) -> Iterator[Sequence[Way]]:
    """Asked by hand and through vLLM's own router; one more prefill has other weights."""
    port = free_port()
    others = dataclasses.replace(shop.options, model=build(shop.scratch, "small", seed=1))
    stranger = vllm_server("stranger", others, f"{bare_word()},bootstrap_port={port}", shop.first)
    with shop.pair(shop.options, shop.options, more=[stranger]) as pair:
        pair.stranger = (stranger, f"http://127.0.0.1:{port}")
        fronts = routers(shop, pair)
        with running(*fronts.values()):
            learn(fronts["concurrent"])
            routed = dataclasses.replace(pair, fronts=fronts)
            asked = (
                "one prompt",
                "list of prompts",
                "the same prompt twice in a list",
                "n = 3",
                "chat, n = 2",
            )
            yield [
                Way("by hand", pair, [*KINDS, "prefix caches reset with running requests"]),
                Way("vllm-router", routed, [*asked, "prefill restarted"]),
                Way("by hand", pair, ["parameters from before a restart of prefill"]),
            ]


def routers(shop: Workshop, pair: Pair, *extra: str) -> dict[Any, Process]:
    """One that asks prefill first, and one that asks both at once; it learns of prefill by its first requests."""
    port = int(pair.bootstrap.rpartition(":")[2])
    made = {
        dispatch: router(pair.prefill, pair.decode, shop.scratch, dispatch=dispatch, bootstrap_port=port)
        for dispatch in ("sequential", "concurrent")
    }
    for front in made.values():
        front.command = [*front.command, *extra]
    return made


@contextmanager
def converting(shop: Workshop) -> Iterator[Sequence[Way]]:
    """Pages of 32 tokens to pages of 128: each is converted on its way."""
    small = dataclasses.replace(shop.options, block_size=32)
    with shop.pair(small, dataclasses.replace(shop.options, block_size=128)) as pair:
        names = [name for name in KINDS if name != "other weights of the same shape"]
        yield [Way("pages converted", pair, names)]


@contextmanager
def lora(shop: Workshop) -> Iterator[Sequence[Way]]:
    """Two adapters on each server."""
    adapters = [f"{name}={build_adapter(shop.scratch, name, seed)}" for seed, name in enumerate(("a", "b"))]
    options = shop.with_extra(
        "--enable-lora", "--max-lora-rank", "8", "--max-loras", "2", "--lora-modules", *adapters
    )
    with shop.pair(options, options) as pair:
        yield [Way("LoRA", pair, ("each LoRA adapter", "another LoRA adapter's KV"))]


@contextmanager
def embeddings(shop: Workshop) -> Iterator[Sequence[Way]]:
    options = shop.with_extra("--enable-prompt-embeds")
    with shop.pair(options, options) as pair:
        yield [Way("embeddings", pair, ("prompt embeddings", "another prompt's embeddings", "one prompt"))]


@contextmanager
def images(shop: Workshop) -> Iterator[Sequence[Way]]:
    options = dataclasses.replace(shop.options, model=build_vision_model(shop.scratch), max_model_len=2048)
    with shop.pair(options, options) as pair:
        yield [Way("images", pair, ("an image", "another image of the same size", "chat, n = 2"))]


@contextmanager
def data_parallel(shop: Workshop) -> Iterator[Sequence[Way]]:
    """Two engines on each side, with fixed ports; by hand and through the router's data parallel mode."""
    options = shop.with_extra("--data-parallel-size", "2")
    ports = [free_port(), free_port()]

    def on_prefill(port: int) -> str:
        return f"{bare_word(port=ports[0])},bootstrap_port={port}"

    with shop.pair(
        options, options, shop.options, on_prefill=on_prefill, on_decode=bare_word(port=ports[1])
    ) as pair:
        pair.dp_size = 2
        fronts = routers(shop, pair, "--intra-node-data-parallel-size", "2")
        with running(*fronts.values()):
            learn(fronts["concurrent"], requests=2)
            yield [
                Way("data parallel", pair, BOUND, spread=True),
                Way("data parallel, router", dataclasses.replace(pair, fronts=fronts), BOUND[:3]),
            ]


def _drafts(
    name: str,
    speculative: Callable[[Workshop], dict[str, Any]],
    sides: Literal["both", "prefill", "decode"],
    model: Callable[[Path], Path] | None = None,
) -> Callable[[Workshop], Any]:
    """Drafts on these sides. Greedy only: how often a seeded sample draws depends on drafts.

    ``model``: builds another one than the small model. The judge drafts where decode does.
    """

    @contextmanager
    def drafting(shop: Workshop) -> Iterator[Sequence[Way]]:
        options = (
            shop.options if model is None else dataclasses.replace(shop.options, model=model(shop.scratch))
        )
        drafts = shop.with_extra("--speculative-config", json.dumps(speculative(shop)), options=options)
        greedy = ["the same prompt twice in a list" if name == "n = 3" else name for name in BOUND]
        prefill = options if sides == "decode" else drafts
        decode = options if sides == "prefill" else drafts
        with shop.pair(prefill, decode, decode) as pair:
            yield [Way(f"{name} drafts" if sides == "both" else f"{name} drafts on {sides}", pair, greedy)]

    return drafting


def _ngram(_: Workshop) -> dict[str, Any]:
    return {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}


def _eagle(shop: Workshop) -> dict[str, Any]:
    return {"method": "eagle", "model": str(build_draft(shop.scratch)), "num_speculative_tokens": 2}


def _multi_token(_: Workshop) -> dict[str, Any]:
    return {"method": "mtp", "num_speculative_tokens": 1}


def beside_a_store(
    shop: Workshop, name: str, *, ours_first: bool, bootstrap_port: int | None = None
) -> dict[str, Any]:
    """MultiConnector with ours and vLLM's ExampleConnector, which keeps KV in files."""
    options = {"host": "127.0.0.1", **TIMES}
    if bootstrap_port is not None:
        options["bootstrap_port"] = bootstrap_port
    ours = {"kv_connector": "sage_kvt", "kv_role": "kv_both", "kv_connector_extra_config": options}
    folder = shop.scratch / f"kv-{name}-{ours_first}"
    store = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": [ours, store] if ours_first else [store, ours]},
    }


def _stores(ours_first: bool) -> Callable[[Workshop], Any]:
    @contextmanager
    def beside(shop: Workshop) -> Iterator[Sequence[Way]]:
        on_decode = beside_a_store(shop, "decode", ours_first=ours_first)
        with shop.pair(
            shop.options,
            shop.options,
            on_prefill=lambda port: beside_a_store(
                shop, "prefill", ours_first=ours_first, bootstrap_port=port
            ),
            on_decode=on_decode,
        ) as pair:
            name = "MultiConnector, ours " + ("first" if ours_first else "second")
            yield [Way(name, pair, (*BOUND, "the same prompt twice in a list"))]

    return beside


SETUPS: dict[str, Callable[[Workshop], Any]] = {
    "plain": plain,
    "converting": converting,
    "lora": lora,
    "embeddings": embeddings,
    "images": images,
    "data_parallel": data_parallel,
    "ngram": _drafts("n-gram", _ngram, "both"),
    "ngram_on_prefill": _drafts("n-gram", _ngram, "prefill"),
    "ngram_on_decode": _drafts("n-gram", _ngram, "decode"),
    "eagle": _drafts("EAGLE", _eagle, "both"),
    "eagle_on_prefill": _drafts("EAGLE", _eagle, "prefill"),
    "eagle_on_decode": _drafts("EAGLE", _eagle, "decode"),
    "mtp": _drafts("MTP", _multi_token, "both", build_multi_token_model),
    "store_behind": _stores(True),
    "store_before": _stores(False),
}
