# SPDX-License-Identifier: Apache-2.0
"""A vLLM that lets what it has end, before it pauses or shuts down, tells no connector of it.

Prefills that wait to be fetched are part of what it has, but from 0.30 on vLLM does not know them
(``held_blocks.py``). It would clear a cache whose blocks are held, and fail; or shut down while decode fetches. Whether
there is work left says ``EngineCoreProc.has_work``, which vLLM asks before each step, to pause and to shut down.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sage_kv_connector.integrations.common.engine_methods import wrap_method
from sage_kv_connector.integrations.vllm.scheduler_connectors import connectors_with


def follow_draining() -> None:
    """Let connectors of ours hear of it, from now on. Idempotent; nothing happens in a vLLM that asks otherwise."""
    wrap_method("vllm.v1.engine.core", "EngineCoreProc", "has_work", _telling)


def _telling(has_work: Callable[..., bool]) -> Callable[..., bool]:
    def wrapped(self: Any) -> bool:
        draining = _draining(self)
        for connector in connectors_with("drains", self.scheduler):
            connector.drains(draining)
        return has_work(self)

    return wrapped


def _draining(core: Any) -> bool:
    """Paused, or shutting down with time for what is under way (``--shutdown-timeout``)."""
    paused = getattr(getattr(core.scheduler, "pause_state", None), "name", "UNPAUSED") != "UNPAUSED"
    ends = getattr(getattr(core, "shutdown_state", None), "name", "RUNNING") != "RUNNING"
    return paused or (ends and bool(getattr(core.vllm_config, "shutdown_timeout", 0)))
