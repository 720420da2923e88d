# SPDX-License-Identifier: Apache-2.0
"""A vLLM plugin for servers that are evaluated, on a CPU: their KV is changed as ``SAGE_KVT_EVALUATION_KV`` says.

The variable holds an object of evaluation/kv_change.py. ``when`` is

* ``sent``: a prefill server computes as ever, then a layer's pages take the changed KV, and that is what is sent.
  The server must run each prompt in one pass: no prefix caching, no chunks. It raises RuntimeError otherwise.
* ``written``: whatever the server itself puts into its cache is cast, as a cache of that dtype would.
"""

from __future__ import annotations

import logging
import os
import re
from typing import Any

VARIABLE = "SAGE_KVT_EVALUATION_KV"
logger = logging.getLogger("vllm.sage_kvt_evaluation")


def change_kv() -> None:
    """Patch vLLM's CPU attention in this process, where the variable is set."""
    told = os.environ.get(VARIABLE)
    if not told:
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    from evaluation.kv_change import KVChange

    if getattr(CPUAttentionBackendImpl, "sage_kvt_changed", False):
        return
    change = KVChange.from_json(told)
    {"sent": _change_what_is_sent, "written": _change_what_is_written}[change.when](
        CPUAttentionBackendImpl, change
    )
    CPUAttentionBackendImpl.sage_kvt_changed = True
    logger.warning("KV of this server is CHANGED for an evaluation: %s", told)


def _number(layer: Any) -> int:
    found = re.search(r"\.layers\.(\d+)\.", layer.layer_name)
    if found is None:
        raise RuntimeError(f"{layer.layer_name} does not say which layer it is")
    return int(found[1])


def _change_what_is_sent(attention: Any, change: Any) -> None:
    real = attention.forward

    def forward(
        self: Any,
        layer: Any,
        query: Any,
        key: Any,
        value: Any,
        kv_cache: Any,
        metadata: Any,
        *rest: Any,
        **more: Any,
    ) -> Any:
        answer = real(self, layer, query, key, value, kv_cache, metadata, *rest, **more)
        if metadata is None:  # a warm-up
            return answer
        starts = metadata.query_start_loc.tolist()
        whole = metadata.seq_lens.tolist()
        tokens = metadata.num_actual_tokens
        changed_key, changed_value = key[:tokens].clone(), value[:tokens].clone()
        for first, last, length in zip(starts, starts[1:], whole, strict=False):
            if last - first != length:
                raise RuntimeError(
                    f"{last - first} of {length} tokens are computed in this pass, must be all"
                )
            changed_key[first:last] = change.apply("k", _number(layer), key[first:last])
            changed_value[first:last] = change.apply("v", _number(layer), value[first:last])
        self.do_kv_cache_update(layer, changed_key, changed_value, kv_cache, metadata.slot_mapping[:tokens])
        return answer

    attention.forward = forward


def _change_what_is_written(attention: Any, change: Any) -> None:
    real = attention.do_kv_cache_update

    def do_kv_cache_update(self: Any, layer: Any, key: Any, value: Any, *rest: Any, **more: Any) -> None:
        number = _number(layer)
        real(self, layer, change.apply("k", number, key), change.apply("v", number, value), *rest, **more)

    attention.do_kv_cache_update = do_kv_cache_update
