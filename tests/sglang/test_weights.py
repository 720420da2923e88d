# SPDX-License-Identifier: Apache-2.0
"""Weights that SGLang replaces in place: whoever wants to know hears of another version once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sage_kv_connector.integrations.sglang import weights


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """As much of a scheduler's process as tells of versions."""
    state = SimpleNamespace(weight_version="default")
    args = SimpleNamespace(model_path="a-model", load_format="dummy")
    context = ModuleType("sglang.srt.runtime_context")
    context.get_serving = lambda: state  # type: ignore[attr-defined]
    context.get_server_args = lambda: args  # type: ignore[attr-defined]
    scheduler = ModuleType("sglang.srt.managers.scheduler")

    class Scheduler:
        def record_weight_version_change(self, new_version: str | None) -> None:
            state.weight_version = new_version or state.weight_version

    scheduler.Scheduler = Scheduler  # type: ignore[attr-defined]
    for name, module in {"sglang": ModuleType("sglang"), "sglang.srt": ModuleType("sglang.srt")}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, context.__name__, context)
    monkeypatch.setitem(sys.modules, scheduler.__name__, scheduler)
    monkeypatch.setattr(weights, "_listeners", [])
    yield scheduler.Scheduler()


def test_a_version_is_part_of_what_the_weights_are(serving: Any) -> None:
    first = weights.own_weights()
    serving.record_weight_version_change(new_version="7")
    assert (first, weights.own_weights()) == ("as stored: dummy", "as stored: dummy, version 7")


def test_listeners_hear_of_another_version_once(serving: Any) -> None:
    heard: list[str] = []
    other: list[str] = []
    weights.follow_weights(heard.append)
    weights.follow_weights(other.append)
    for version in ("7", "7", None, "8"):
        serving.record_weight_version_change(new_version=version)
    assert heard == other == ["7", "8"]


def test_a_release_without_versions_has_the_first_one(monkeypatch: pytest.MonkeyPatch, serving: Any) -> None:
    module: Any = sys.modules["sglang.srt.runtime_context"]
    monkeypatch.setattr(module, "get_serving", lambda: SimpleNamespace())
    assert weights.own_version() == "default"
