# SPDX-License-Identifier: Apache-2.0
"""vLLM behind ``InferenceBackend``: an ``LLM`` of this process with our connector, nothing of it changed.

The connector registers the KV tensors when vLLM makes them. What they look like is read from the
workers by ``WorkerExtension``, which vLLM mixes into its worker class (``worker_extension_cls``).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import msgspec

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.bootstrap_room import new_room
from sage_kv_connector.contract.peer import RegisteredKV
from sage_kv_connector.contract.plan import TransportPlan
from sage_kv_connector.engine import advertised_host
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.integrations.sage.inference_backend import (
    BackendUnavailable,
    Decoded,
    Prefilled,
    plan_between,
)

PREFILL_PARAMS = {"do_remote_decode": True, "do_remote_prefill": False}


class WorkerExtension:
    """Methods that vLLM's workers get; called by name through ``LLM.collective_rpc``."""

    def sage_kvt_registered(self) -> bytes:
        """This worker's KV cache as MessagePack: engine id, rank, schema, addresses, node."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return msgspec.msgpack.encode(get_kv_transfer_group().worker_side.registered())


class VllmBackend:
    """One ``vllm.LLM``. ``options`` go to it; ``enforce_eager``, ``dtype``, ``max_model_len`` and so on."""

    def __init__(self, model: str, config: KVTransportConfig, **options: Any) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise BackendUnavailable("vllm is not installed in this environment (pip install vllm)")
        from vllm import LLM
        from vllm.config import KVTransferConfig

        self._config = config
        transport = config.model_dump(mode="json", exclude_unset=True, exclude={"config_file"})
        # Decode in SGLang asks there who we are.
        transport["bootstrap_port"] = config.bootstrap_port or free_port()
        self._bootstrap = {
            "bootstrap_host": advertised_host(config),
            "bootstrap_port": transport["bootstrap_port"],
        }
        transport |= config.given_secrets()
        self._llm: Any = LLM(
            model,
            kv_transfer_config=KVTransferConfig(
                kv_connector="sage_kvt",
                kv_role="kv_both",
                kv_connector_extra_config=transport,
                kv_load_failure_policy="recompute",
            ),
            worker_extension_cls=f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
            **options,
        )
        self._registered: list[RegisteredKV] = []

    def register_kv(self) -> list[RegisteredKV]:
        if not self._registered:
            answers = self._engine().collective_rpc("sage_kvt_registered")
            decode = msgspec.msgpack.Decoder(RegisteredKV).decode
            self._registered = sorted(map(decode, answers), key=lambda one: one.rank)
        return list(self._registered)

    def prefill(self, request_id: str, prompt: Sequence[int]) -> Prefilled:
        if not prompt:
            raise ValueError("prompt is empty; it must hold at least one token id")
        room = self._bootstrap | {"bootstrap_room": new_room()}
        answer = self._generate(prompt, 1, PREFILL_PARAMS | room)
        handover = (answer.kv_transfer_params or {}) | room
        return Prefilled(request_id, tuple(prompt), int(answer.outputs[0].token_ids[0]), handover)

    def decode(self, prefilled: Prefilled, max_tokens: int) -> Decoded:
        params = {"do_remote_prefill": True, **prefilled.handover} if prefilled.handover else {}
        answer = self._generate(prefilled.prompt, max_tokens, params)
        return Decoded(prefilled.request_id, tuple(answer.outputs[0].token_ids))

    def transport_plan(self, peer: RegisteredKV) -> TransportPlan:
        return plan_between(self.register_kv()[0].schema, peer, self._config)

    def close(self) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()

    def _generate(self, prompt: Sequence[int], max_tokens: int, params: dict[str, Any]) -> Any:
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0, max_tokens=max_tokens, extra_args={"kv_transfer_params": params}
        )
        (answer,) = self._engine().generate({"prompt_token_ids": list(prompt)}, sampling, use_tqdm=False)
        return answer

    def _engine(self) -> Any:
        if self._llm is None:
            raise RuntimeError("this backend was closed")
        return self._llm
