# SPDX-License-Identifier: Apache-2.0
"""What orchestrators of fleets make of a client's request: what they send prefill, and then decode.

Read in their sources on 2026-12-01: ``pkg/sidecar/proxy/connector_nixlv2.go`` and ``nixl_push_identity.go`` of
llm-d/llm-d-router, ``components/src/dynamo/vllm/kv_connector_protocols.py`` of ai-dynamo/dynamo,
``pkg/plugins/gateway/algorithms/pd/transfer/shfs.go`` of vllm-project/aibrix,
``python/ray/llm/_internal/serve/engines/common/kv_transfer/base.py`` of ray-project/ray. Dynamo and Ray Serve call the
engine, not its HTTP server; the parameters are these.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from integration_tests.request_pair import NIXL_SHAPED, Pair, Sent, ask

#: What llm-d's sidecar keeps of an answer that says ``transfer_mode: "push"``.
PUSH_IDENTITY = (
    "remote_engine_id", "remote_host", "remote_port", "tp_size", "transfer_mode", "pp_size", "dcp_size",
)  # fmt: skip


def _unchanged(params: dict[str, Any]) -> dict[str, Any]:
    return params


def _with_pods_address(params: dict[str, Any]) -> dict[str, Any]:
    """AIBrix writes its own idea of where prefill is over what prefill said."""
    return {**params, "remote_host": "10.42.0.17"}


def _decoded(pair: Pair, sent: Sent, headers: dict[str, str], params: dict[str, Any]) -> dict[str, Any]:
    return ask(pair.decode, sent.path, {**sent.body, "kv_transfer_params": params}, headers=headers)


@dataclass(frozen=True)
class Fleet:
    """Asks prefill first. ``capped``: what limits prefill to one token; ``passed_on``: its parameters, to decode."""

    name: str
    capped: tuple[str, ...] = ("max_tokens", "max_completion_tokens")
    passed_on: Callable[[dict[str, Any]], dict[str, Any]] = _unchanged

    def hand_over(self, pair: Pair, sent: Sent) -> dict[str, Any]:
        """What decode answers."""
        same_id = {"x-request-id": str(uuid.uuid4())}
        params = self.passed_on(self.prefilled(pair, sent, same_id))
        return _decoded(pair, sent, same_id, params)

    def prefilled(self, pair: Pair, sent: Sent, headers: dict[str, str], **more: Any) -> dict[str, Any]:
        """The parameters that prefill answers. ``more``: what it is sent besides."""
        body = {key: value for key, value in sent.body.items() if key not in ("stream_options", "min_tokens")}
        body |= dict.fromkeys(self.capped, 1)
        body |= {"stream": False, "kv_transfer_params": {**NIXL_SHAPED, **more}}
        params: dict[str, Any] = ask(pair.prefill, sent.path, body, headers=headers)["kv_transfer_params"]
        return params


FLEETS = (
    Fleet("llm-d"),
    Fleet("Dynamo", capped=("max_tokens", "min_tokens")),
    Fleet("AIBrix", passed_on=_with_pods_address),
    Fleet("Ray Serve"),
)


class PushingSidecar:
    """llm-d's sidecar in its push mode: prefill first, once; then both at once, with what it remembers of prefill."""

    def __init__(self) -> None:
        self._sidecar = FLEETS[0]
        self._remembered: dict[str, Any] = {}

    def hand_over(self, pair: Pair, sent: Sent) -> dict[str, Any]:
        """What decode answers."""
        request_id = str(uuid.uuid4())
        headers, transfer = {"x-request-id": request_id}, {"transfer_id": f"xfer-{uuid.uuid4()}"}
        if not self._remembered:
            params = self._sidecar.prefilled(pair, sent, headers, **transfer)
            assert params["transfer_mode"] == "push", "else it never asks both at once"
            self._remembered = {key: params[key] for key in PUSH_IDENTITY if key in params}
            return _decoded(pair, sent, headers, {**params, **transfer})
        shared = {"do_remote_prefill": True, "do_remote_decode": False, "remote_request_id": request_id}
        with ThreadPoolExecutor(1) as pool:
            prefill = pool.submit(self._sidecar.prefilled, pair, sent, headers, **transfer)
            answer = _decoded(pair, sent, headers, {**self._remembered, **shared, **transfer})
            prefill.result()
        return answer
