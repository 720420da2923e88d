# SPDX-License-Identifier: Apache-2.0
"""The layout that the connector asks for is vLLM's to give: what is set, and what a backend can, comes first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.config import KVTransferConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout

from sage_kv_connector.integrations.vllm import required_layout as module

ANY = ["LBNHC", "LBHNC", "BLNHC", "BLHNC", "BHLNC", "LHBNC"]


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_KV_CACHE_LAYOUT", raising=False)
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)


def resolved(candidates: list[str], *, use_mla: bool = False) -> str:
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(use_mla=use_mla),
        cache_config=SimpleNamespace(kv_cache_layout=None),
        kv_transfer_config=KVTransferConfig(
            kv_connector="SageKVConnector",
            kv_connector_module_path="sage_kv_connector.integrations.vllm.connector",
            kv_role="kv_both",
        ),
    )
    return str(resolve_kv_cache_layout(config, [candidates]).name)


def test_backends_without_a_preference_put_heads_outside_of_tokens() -> None:
    assert resolved(ANY) == "LBHNC"


def test_what_the_user_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "BLNHC")
    assert resolved(ANY) == "BLNHC"


def test_a_backend_that_can_t_keeps_its_own() -> None:
    assert resolved(["LBNHC"]) == "LBNHC"


def test_latents_are_left_to_the_backend() -> None:
    assert resolved(["LBNHC", "LBHNC"], use_mla=True) == "LBNHC"


def test_where_it_may_cost_the_backend_its_kernels_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: False)
    assert resolved(["LHBNC", "LBHNC"]) == "LHBNC"


def test_releases_without_named_layouts_have_another_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    config = SimpleNamespace(model_config=SimpleNamespace(use_mla=False))
    assert module.required_layout(config) == "HND"
