# SPDX-License-Identifier: Apache-2.0
"""Whether a router chose a request's data parallel rank (``X-data-parallel-rank``); vLLM's scheduler is not told.

A router that remembers where a prefill is does so by server and by the rank that it chose. Where vLLM itself spreads
requests over its ranks the next one is likely to be computed by another rank than the one that answered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sage_kv_connector.integrations.common.bootstrap_answers import DP_ENGINE
from sage_kv_connector.integrations.common.engine_methods import wrap_method

_CHOSEN = "sage_kvt_rank_was_chosen"


def follow_chosen_ranks() -> None:
    """Let requests remember it, from now on. Idempotent; nothing happens in a vLLM that makes them otherwise."""
    wrap_method("vllm.v1.request", "Request", "from_engine_core_request", _remembering)


def _remembering(made: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(cls: Any, request: Any, *arguments: Any, **named: Any) -> Any:
        result = made(cls, request, *arguments, **named)
        setattr(result, _CHOSEN, getattr(request, "data_parallel_rank", None) is not None)
        return result

    return wrapped


def always_this_engine(request: Any, engine_id: str, parallel_config: Any) -> bool:
    """Whether a router that asks as it asked for this request comes to this engine again, not to a sibling."""
    alone = DP_ENGINE.search(engine_id) is None
    own_server = bool(getattr(parallel_config, "data_parallel_external_lb", False))
    return alone or own_server or bool(getattr(request, _CHOSEN, False))
