# SPDX-License-Identifier: Apache-2.0
"""vLLM's servers that faults are tried on: how they are started and asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from integration_tests.cluster import PREFILL_PARAMS, new_prompt, settled_gauges
from integration_tests.fault_servers import GAUGES, PATIENCE_S, TIMES, Told, proxied, told
from integration_tests.request_pair import Pair, ask
from integration_tests.request_setups import Workshop
from integration_tests.tcp_proxy import TcpProxy
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.launch.process import Process, ServerError, running
from sage_kv_connector.launch.vllm import VllmOptions, complete, vllm_server


@dataclass
class VllmServers:
    """``alone`` computes everything itself. Decode reaches prefill's ranks through ``proxies``."""

    prefill: Process
    decode: Process
    alone: Process
    proxies: Sequence[TcpProxy]
    audit: Path
    bootstrap: str

    def settle(self) -> dict[str, float]:
        both = (("prefill", self.prefill), ("decode", self.decode))
        return {
            f"{role}.{name}": value
            for role, server in both
            for name, value in settled_gauges(server).items()
            if name in GAUGES
        }

    def prefilled(self, prompt: list[int]) -> dict[str, Any]:
        """Have it prefilled; what decode must be sent."""
        first = complete(
            self.prefill.url, prompt, max_tokens=1, kv_transfer_params=PREFILL_PARAMS, stream=False
        )
        assert first.kv_transfer_params is not None
        return first.kv_transfer_params

    def decoded(self, prompt: list[int], params: dict[str, Any] | None = None) -> Told:
        return told(
            lambda: (
                complete(
                    self.decode.url, prompt, max_tokens=8, kv_transfer_params=params, timeout_s=PATIENCE_S
                ).token_ids
            )
        )

    def expected(self, prompt: list[int]) -> list[int]:
        return complete(self.alone.url, prompt, max_tokens=8).token_ids

    def is_right(self, prompt: list[int], answer: Told) -> bool:
        """The tokens of a lone server, now and when decode is asked again."""
        right = self.expected(prompt)
        return answer.good and answer.token_ids == right and self.decoded(prompt).token_ids == right

    def forget_prompts(self) -> None:
        """Decode's prefix cache is empty then."""
        ask(self.decode, "/reset_prefix_cache", {}, empty=True)

    def moved(self) -> list[dict[str, Any]]:
        """Records of transfers that ended, of both sides; empties the file."""
        time.sleep(0.5)
        records = [json.loads(line) for line in self.audit.read_text().splitlines()]
        self.audit.write_text("")
        return records

    @contextmanager
    def both_asked(self, prompt: list[int]) -> Iterator[dict[str, Any]]:
        """Prefill is asked now; what decode must be sent at the same time."""
        params, for_decode = Pair(self.prefill, self.decode, self.alone, self.bootstrap).both()

        def prefill() -> None:
            told(
                lambda: (
                    complete(
                        self.prefill.url, prompt, max_tokens=1, kv_transfer_params=params, stream=False
                    ).token_ids
                )
            )

        thread = threading.Thread(target=prefill)
        thread.start()
        try:
            yield for_decode
        finally:
            thread.join()


@contextmanager
def vllm_servers(scratch: Path, model: Path | None = None, ranks: int = 1) -> Iterator[VllmServers]:
    """Started with the times of ``fault_servers``; decode fetches over tcp, through a proxy for each rank."""
    shop = Workshop(scratch)
    extra = ("--dtype", "float32", "--num-gpu-blocks-override", "160")
    if ranks > 1:
        extra += ("--tensor-parallel-size", str(ranks))
    options = VllmOptions(model or shop.model, scratch, 4096, extra=extra, env={**shop.options.env})
    lone = VllmOptions(model or shop.model, scratch, 4096, extra=("--dtype", "float32"))
    audit, bootstrap = scratch / "audit.jsonl", free_port()
    audit.touch()
    common = {"host": "127.0.0.1", "audit_file": audit, **TIMES}
    words = ",".join(f"{key}={value}" for key, value in common.items())
    with proxied(ranks) as (port, proxies):
        to_proxy = f"port={port},advertise_port={proxies[0].port},bootstrap_port={bootstrap}"
        prefill = vllm_server("prefill", options, f"sage_kvt:{words},{to_proxy}", shop.first)
        decode = vllm_server("decode", options, f"sage_kvt:{words},backend=tcp", shop.second)
        alone = vllm_server("alone", lone, None, shop.second)
        with running(prefill, decode, alone):
            servers = VllmServers(prefill, decode, alone, proxies, audit, f"http://127.0.0.1:{bootstrap}")
            prompt = new_prompt(300)
            if not servers.is_right(prompt, servers.decoded(prompt, servers.prefilled(prompt))):
                raise ServerError("a hand-over without any fault is not right")
            yield servers
