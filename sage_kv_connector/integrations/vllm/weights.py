# SPDX-License-Identifier: Apache-2.0
"""Weights that are replaced in a running vLLM: its engine is told their version, its connectors are not.

``EngineCore.set_weight_version`` is where both ways to say it come together, ``POST /update_weight_version`` and the
end of an update over vLLM's weight transfer (since 0.32). It runs in the scheduler's process, between two steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sage_kv_connector.integrations.common.engine_methods import wrap_method
from sage_kv_connector.integrations.vllm.scheduler_connectors import connectors_with


def follow_weights() -> None:
    """Let connectors of ours hear of versions, from now on. Idempotent; nothing happens in a vLLM without versions."""
    wrap_method("vllm.v1.engine.core", "EngineCore", "set_weight_version", _heard)


def _heard(set_weight_version: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, weight_version: str) -> Any:
        result = set_weight_version(self, weight_version)
        for connector in connectors_with("weights_replaced", self.scheduler):
            connector.weights_replaced(weight_version)
        return result

    return wrapped
