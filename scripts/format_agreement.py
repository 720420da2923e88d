# SPDX-License-Identifier: Apache-2.0
"""Greedy tokens with a prompt's KV through the wire against those with exact KV.

As after a hand-over: all but the prompt's last token come from the altered cache, that
token and the new ones are computed from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from integration_tests import recall
from sage_kv_connector.format.wire_format import WireFormat
from scripts import kv_samples
from scripts.format_round_trip import Variant, round_trip

Pair = tuple[Variant, Variant]


def candidate_pairs() -> list[Pair]:
    """Formats of K and V that are compared on whole models."""
    exact = Variant(WireFormat("bf16"))
    pairs = [(exact, exact)]
    for dtype in ("fp8_e4m3", "fp8_e5m2"):
        for granularity in ("none", "channel", "token"):
            pairs.append((Variant(WireFormat(dtype, granularity)),) * 2)
    k, v = (WireFormat("int4", granularity, zero_point=True) for granularity in ("channel", "token"))
    coarse = WireFormat("int4", "channel", 128, zero_point=True)
    pairs += [(Variant(k), Variant(v)), (Variant(k), Variant(k)), (Variant(v), Variant(v))]
    pairs += [(Variant(WireFormat("int4", "channel")), Variant(WireFormat("int4", "token")))]
    pairs += [
        (Variant(WireFormat("int4", "channel", 32, zero_point=True)), Variant(v)),
        (Variant(coarse), Variant(v)),
    ]
    pairs += [(Variant(k), exact), (exact, Variant(v)), (exact, Variant(v, rotate=True))]
    pairs += [(Variant(k, rotate=True), Variant(v))]
    pairs += [(Variant(k), Variant(v, rotate=True)), (Variant(k, rotate=True), Variant(v, rotate=True))]
    pairs += [(Variant(v, rotate=True), Variant(v, rotate=True))]
    pairs += [(Variant(k, feedback=True), Variant(v, feedback=True))]
    return pairs


def _prompts(name: str, count: int) -> Iterator[tuple[Any, list[int], int, list[int]]]:
    """(model, prompt ids, tokens to decode, how the text the prompt was cut from goes on)."""
    if name == "recall":
        model = kv_samples.load_recall()
        for seed in range(count):
            tokens = (300, 600, 1000, 1500, 2000)[seed % 5]
            # Every second prompt is as full of entries as it can be: the hardest to recall from.
            entries = min(recall.KEYS, (tokens - 60) // recall.ENTRY_TOKENS) if seed % 2 else None
            prompt, answer = recall.recall_prompt(500_000 + seed, tokens, entries=entries)
            yield model, prompt, recall.SLOTS, answer
        return
    model, tokenizer = kv_samples.smollm2()
    for seed in range(count):
        ids, tokens = tokenizer(kv_samples.prose(8000, 4000 * seed)).input_ids, (256, 512, 768)[seed % 3]
        yield model, ids[:tokens], 16, ids[tokens : tokens + 128]


def agreement(name: str, pairs: list[Pair], count: int) -> list[dict[str, object]]:
    """For each pair: ``same``: share of greedy tokens before the first that differs; ``next``: share of
    right next tokens when the exact run's tokens are fed; ``kl``: mean divergence of the next token's
    distributions over the text that follows the prompt, in nats."""
    from transformers import DynamicCache

    same, following, divergence = torch.zeros(3, len(pairs))
    for model, prompt, decode, text in _prompts(name, count):
        with torch.no_grad():
            cache = model(torch.tensor([prompt[:-1]]), use_cache=True, logits_to_keep=1).past_key_values
            exact = [
                (layer.keys.bfloat16().float(), layer.values.bfloat16().float()) for layer in cache.layers
            ]
            keys, values = (torch.stack([layer[i] for layer in exact]) for i in (0, 1))

            def cache_of(keys: torch.Tensor, values: torch.Tensor) -> Any:
                made = DynamicCache()
                for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
                    made.update(k, v, layer)
                return made

            made, fed, wanted = cache_of(keys, values), prompt[-1], []
            for _ in range(decode):
                logits = model(torch.tensor([[fed]]), past_key_values=made).logits[0, -1]
                fed = int(logits.argmax())
                wanted.append(fed)
            given = torch.tensor([[prompt[-1], *wanted[:-1]]])
            text_given = torch.tensor([[prompt[-1], *text[:-1]]])
            truth = model(text_given, past_key_values=cache_of(keys, values)).logits[0].log_softmax(-1)
            found: dict[tuple[str, Variant], torch.Tensor] = {}
            for number, (k, v) in enumerate(pairs):
                for plane, variant, plain in (("k", k, keys), ("v", v, values)):
                    if (plane, variant) not in found:
                        found[plane, variant] = round_trip(plain, variant)
                altered = found["k", k], found["v", v]
                logits = model(given, past_key_values=cache_of(*altered)).logits[0]
                equal = (logits.argmax(-1) == torch.tensor(wanted)).float()
                same[number] += equal.cumprod(0).mean() / count
                following[number] += equal.mean() / count
                logits = model(text_given, past_key_values=cache_of(*altered)).logits[0].log_softmax(-1)
                divergence[number] += (truth.exp() * (truth - logits)).sum(-1).mean() / count
    rows: list[dict[str, object]] = []
    print(
        f"{name}, {count} prompts: greedy tokens before the first that differs, next tokens, divergence in nats"
    )
    for number, (k, v) in enumerate(pairs):
        row = {"k": k.name, "v": v.name, "same": float(same[number]), "next": float(following[number])}
        rows.append({**row, "kl": float(divergence[number])})
        print(
            f"{k.name:30} {v.name:30} {same[number]:7.2%} {following[number]:7.2%} {divergence[number]:.5f}"
        )
    return rows
