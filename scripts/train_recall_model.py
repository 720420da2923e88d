# SPDX-License-Identifier: Apache-2.0
"""Train the recall model of the tests (integration_tests/recall_model) on one core.

A Qwen3 of three layers learns associative recall, see integration_tests/recall.py. The
loss counts recalled values only. Sequences grow from stage to stage; a stage ends when
the share of right tokens is high enough, or its steps are used up.

    python -m scripts.train_recall_model --out integration_tests/recall_model
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from integration_tests import recall


class Stage(NamedTuple):
    tokens: int
    batch: int
    #: Most entries and questions of a sequence.
    entries: int
    questions: int
    most_steps: int
    #: The stage ends at this share of right tokens over the last 20 steps.
    enough: float
    #: Learning rate.
    rate: float


STAGES = (
    Stage(tokens=128, batch=20, entries=6, questions=6, most_steps=3000, enough=0.97, rate=1e-3),
    Stage(tokens=192, batch=24, entries=10, questions=8, most_steps=1000, enough=0.99, rate=1e-3),
    Stage(tokens=448, batch=12, entries=24, questions=20, most_steps=600, enough=0.995, rate=4e-4),
    Stage(tokens=1024, batch=5, entries=90, questions=20, most_steps=300, enough=0.998, rate=4e-4),
    Stage(tokens=2304, batch=2, entries=200, questions=40, most_steps=150, enough=0.999, rate=4e-4),
    Stage(tokens=1536, batch=3, entries=140, questions=24, most_steps=250, enough=1.0, rate=1.5e-4),
    Stage(tokens=2176, batch=2, entries=200, questions=40, most_steps=150, enough=1.0, rate=8e-5),
)


def config() -> Qwen3Config:
    return Qwen3Config(
        vocab_size=recall.VOCABULARY,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=False,
        initializer_range=0.04,
        bos_token_id=recall.BOS,
        eos_token_id=recall.EOS,
        dtype="bfloat16",
    )


def prepare(model: Qwen3ForCausalLM) -> None:
    """Start where recall is quick to learn: layer 0 looks one (KV head 0) and two tokens (KV head 1) back.

    All embeddings share channel 0. Layer 0 makes the same query and key of it everywhere,
    in the rotary channels of short wavelength, the query turned by the distance to look back.
    """
    dim, pairs = model.config.head_dim, 8
    turns = model.model.rotary_emb.inv_freq[:pairs]
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0.0, 0.5)
        model.model.embed_tokens.weight[:, 0] = 4.0
        attention.q_norm.weight.fill_(2.0)
        attention.k_norm.weight.fill_(2.0)
        heads = model.config.num_attention_heads
        per_kv_head = heads // model.config.num_key_value_heads
        for head in range(heads):
            back, first = 1 + head // per_kv_head, head * dim
            # A key at distance ``back`` is turned by -back: the query starts there.
            attention.q_proj.weight[first : first + pairs, 0] = torch.cos(back * turns)
            attention.q_proj.weight[first + dim // 2 : first + dim // 2 + pairs, 0] = -torch.sin(back * turns)
        for kv_head in range(model.config.num_key_value_heads):
            attention.k_proj.weight[kv_head * dim : kv_head * dim + pairs, 0] = 1.0


def batch(rng: np.random.Generator, stage: Stage) -> torch.Tensor:
    """(batch, tokens) ids. All sequences of a batch have the same number of questions."""
    questions = int(rng.integers(max(1, stage.questions // 2), stage.questions + 1))
    rows = []
    for _ in range(stage.batch):
        entries = int(rng.integers(max(1, stage.entries // 3), stage.entries + 1))
        fit = (stage.tokens - 1 - questions * recall.QUESTION_TOKENS) // recall.ENTRY_TOKENS
        rows.append(recall.sequence(rng, stage.tokens, min(entries, fit), questions))
    return torch.from_numpy(np.stack(rows))


def answers(ids: torch.Tensor) -> torch.Tensor:
    """True where the *next* token is a value that answers a question."""
    started = (ids == recall.QUESTION).cumsum(1) > 0
    return (started & (ids >= recall.FIRST_VALUE))[:, 1:]


def train(model: Qwen3ForCausalLM, rng: np.random.Generator, minutes: float, first_stage: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    begin, step = time.monotonic(), 0
    for stage in STAGES[first_stage:]:
        recent: list[float] = []
        for stage_step in range(stage.most_steps):
            spent = (time.monotonic() - begin) / 60
            if spent > minutes:
                return
            for group in optimizer.param_groups:
                group["lr"] = stage.rate * min(1.0, (step + 1) / 100)
            ids = batch(rng, stage)
            asked = answers(ids)
            with torch.autocast("cpu", torch.bfloat16):
                hidden = model.model(ids[:, :-1]).last_hidden_state[asked]
                logits = model.lm_head(hidden).float()
            wanted = ids[:, 1:][asked]
            loss = torch.nn.functional.cross_entropy(logits, wanted)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            recent.append((logits.argmax(-1) == wanted).float().mean().item())
            step += 1
            right = float(np.mean(recent[-20:]))
            if stage_step % 25 == 0:
                print(
                    f"{spent:5.1f} min, {stage.tokens} tokens, step {stage_step}: "
                    f"loss {loss.item():.4f}, right {right:.4f}",
                    flush=True,
                )
            if len(recent) >= 20 and right >= stage.enough:
                break
        print(f"stage of {stage.tokens} tokens ended with {right:.4f} right", flush=True)


def exact_recall(model: Qwen3ForCausalLM, tokens: int, prompts: int) -> float:
    """Share of prompts whose greedy eight tokens are all right."""
    right = 0
    for seed in range(prompts):
        ids, expected = recall.recall_prompt(10_000 + seed, tokens)
        with torch.no_grad():
            out = model.generate(
                torch.tensor([ids]), max_new_tokens=recall.SLOTS, do_sample=False, pad_token_id=recall.EOS
            )
        right += out[0, len(ids) :].tolist() == expected
    return right / prompts


def save(model: Qwen3ForCausalLM, out: Path) -> None:
    """bf16 weights, configuration and a tokenizer of one word a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    out.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: number for number, word in enumerate(recall.words())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<eos>"
    ).save_pretrained(out)
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": recall.EOS}) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=recall.MODEL)
    parser.add_argument("--minutes", type=float, default=25.0, help="stop training after so long")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--first-stage", type=int, default=0, help="above 0: go on with the model in --out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", type=int, default=40, help="prompts a length to check at the end")
    parser.add_argument("--check-only", action="store_true", help="check the model in --out, train nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    if not options.check_only:
        if options.first_stage:
            model = Qwen3ForCausalLM.from_pretrained(options.out, dtype=torch.float32)
        else:
            model = Qwen3ForCausalLM(config()).float()
            prepare(model)
        print(f"{sum(weight.numel() for weight in model.parameters())} weights", flush=True)
        train(
            model,
            np.random.default_rng([options.seed, options.first_stage]),
            options.minutes,
            options.first_stage,
        )
        save(model, options.out)
    model = Qwen3ForCausalLM.from_pretrained(options.out, dtype=torch.bfloat16).eval()
    for tokens in (300, 600, 1000, 1500, 2000):
        share = exact_recall(model, tokens, options.check)
        print(f"{tokens} tokens: {share:.1%} of {options.check} prompts exact", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
