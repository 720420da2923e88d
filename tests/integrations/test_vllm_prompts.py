# SPDX-License-Identifier: Apache-2.0
"""A request of vLLM as a prompt: what its KV depends on counts, what differs between servers does not."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sage_kv_connector.integrations.vllm.prompts import prompt_of
from tests.integrations.test_weight_files import save, tensors

torch: Any = pytest.importorskip("torch")


def request(**more: Any) -> SimpleNamespace:
    ids = more.pop("prompt_token_ids", [1, 2, 3, 3, 3, 4])
    return SimpleNamespace(prompt_token_ids=ids, num_prompt_tokens=6, **more)


def image(mm_hash: str | None, identifier: str = "x", offset: int = 2) -> SimpleNamespace:
    place = SimpleNamespace(offset=offset, length=3)
    return SimpleNamespace(modality="image", identifier=identifier, mm_hash=mm_hash, mm_position=place)


def adapter(folder: Path, seed: int, name: str = "sql", number: int = 1) -> SimpleNamespace:
    if not folder.exists():
        folder.mkdir()
        save(folder / "adapter_model.safetensors", tensors(seed))
        (folder / "adapter_config.json").write_text(json.dumps({"r": 8}))
    return SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=str(folder))


def digest(made: SimpleNamespace) -> bytes:
    return prompt_of(made).whole.digest


def test_salts_and_images_tell_prompts_apart() -> None:
    made = [
        request(),
        request(cache_salt="a"),
        request(cache_salt="b"),
        request(mm_features=[image("h1")]),
        request(mm_features=[image("h2")]),
        request(mm_features=[image("h1", offset=1)]),
        request(mm_features=[image(None, "h3")]),
    ]
    assert len({digest(one) for one in made}) == len(made)


def test_an_image_is_its_content_whatever_the_adapter_is_called() -> None:
    made = [request(mm_features=[image("h1", f"{name}:h1")]) for name in ("sql", "code")]
    assert digest(made[0]) == digest(made[1])


def test_an_adapter_is_its_weights_not_its_name_number_or_place(tmp_path: Path) -> None:
    ours = adapter(tmp_path / "a", seed=1)
    theirs = adapter(tmp_path / "b", seed=1, name="other", number=7)
    another = adapter(tmp_path / "c", seed=2)
    assert digest(request(lora_request=ours)) == digest(request(lora_request=theirs))
    assert len({digest(request(lora_request=lora)) for lora in (None, ours, another)}) == 3


def test_an_adapter_whose_files_are_elsewhere_goes_by_its_name(tmp_path: Path) -> None:
    lora = SimpleNamespace(lora_name="sql", lora_int_id=1, lora_path="org/sql-adapter")
    renamed = SimpleNamespace(lora_name="sql2", lora_int_id=1, lora_path="org/sql-adapter")
    assert digest(request(lora_request=lora)) != digest(request(lora_request=renamed))


def test_embeddings_count_where_they_stand_for_tokens() -> None:
    rows = torch.arange(6 * 4, dtype=torch.bfloat16).reshape(6, 4)
    other = rows.clone()
    other[5, 3] += 1
    alone = [request(prompt_token_ids=None, prompt_embeds=one) for one in (rows, other)]
    assert prompt_of(alone[0]).digest(5) == prompt_of(alone[1]).digest(5)
    assert digest(alone[0]) != digest(alone[1])
    mixed = [
        request(prompt_embeds=one, prompt_is_token_ids=[True, False, True, True, True, True])
        for one in (rows, other)
    ]
    assert digest(mixed[0]) == digest(mixed[1]), "the row that differs lies under a token"
