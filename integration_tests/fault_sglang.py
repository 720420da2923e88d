# SPDX-License-Identifier: Apache-2.0
"""SGLang's servers that faults are tried on: how they are started and asked. In SGLang's own environment."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from integration_tests.fault_servers import PATIENCE_S, TIMES, Told, proxied, told
from integration_tests.recall import MODEL
from integration_tests.request_sglang import prompt_of
from integration_tests.tcp_proxy import TcpProxy
from sage_kv_connector.launch.process import Process, ServerError, core_halves, running
from sage_kv_connector.launch.sglang import (
    DECODE,
    PREFILL,
    SglangOptions,
    SglangProcess,
    generate,
    room_at,
    sglang_server,
)

COMMON = ("--dtype", "bfloat16", "--page-size", "16")


@dataclass
class SglangServers:
    """``alone`` computes everything itself. Decode reaches prefill's ranks through ``proxies``."""

    prefill: SglangProcess
    decode: SglangProcess
    alone: Process
    proxies: Sequence[TcpProxy]
    audit: Path

    def settle(self) -> dict[str, float]:
        """A server that has any request left, waiting or running, does not flush its cache."""
        return {
            f"{role}.requests": float(not flushed(server))
            for role, server in (("prefill", self.prefill), ("decode", self.decode))
        }

    def room(self) -> dict[str, Any]:
        return room_at(self.prefill.bootstrap_port)

    def asked(self, server: Process, prompt: list[int], room: dict[str, Any] | None) -> Told:
        return told(
            lambda: generate(server.url, prompt, max_tokens=8, bootstrap=room, timeout_s=PATIENCE_S).token_ids
        )

    @contextmanager
    def prefilling(self, prompt: list[int], room: dict[str, Any]) -> Iterator[None]:
        """As a router that asks both; what prefill answers is nobody's concern."""
        thread = threading.Thread(target=self.asked, args=(self.prefill, prompt, room))
        thread.start()
        try:
            yield
        finally:
            thread.join()

    def handed_over(self, prompt: list[int], room: dict[str, Any] | None = None) -> Told:
        room = room or self.room()
        with self.prefilling(prompt, room):
            return self.asked(self.decode, prompt, room)

    def expected(self, prompt: list[int]) -> list[int]:
        return generate(self.alone.url, prompt, max_tokens=8).token_ids

    def is_right(self, prompt: list[int], answer: Told) -> bool:
        """The tokens of a lone server, now and when both are asked again."""
        right = self.expected(prompt)
        return answer.good and answer.token_ids == right and self.handed_over(prompt).token_ids == right

    def is_refused_well(self, prompt: list[int], answer: Told) -> bool:
        """A reason in time, or right tokens; and then the same prompt is right."""
        if answer.good:
            return self.is_right(prompt, answer)
        return answer.client != "hung" and self.handed_over(prompt).token_ids == self.expected(prompt)

    def forget_prompts(self) -> None:
        for _ in range(20):
            if flushed(self.prefill) and flushed(self.decode):
                return
            time.sleep(0.5)

    def moved(self) -> list[dict[str, Any]]:
        """Records of transfers that ended, of both sides; empties the file."""
        time.sleep(0.5)
        records = [json.loads(line) for line in self.audit.read_text().splitlines()]
        self.audit.write_text("")
        return records


def flushed(server: Process) -> bool:
    request = urllib.request.Request(f"{server.url}/flush_cache", b"")
    try:
        with urllib.request.urlopen(request, timeout=20):
            return True
    except urllib.error.HTTPError:
        return False


def say_version(server: Process, version: str) -> None:
    """As an update of weights does at its end; here they stay what they are."""
    body = json.dumps({"new_version": version, "abort_all_requests": False}).encode()
    request = urllib.request.Request(
        f"{server.url}/update_weight_version", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        assert response.status == 200


@contextmanager
def sglang_servers(scratch: Path, ranks: int = 1) -> Iterator[SglangServers]:
    """Started with the times of ``fault_servers``; decode fetches over tcp, through a proxy for each rank."""
    options = SglangOptions(MODEL, scratch, 2048, 16384, COMMON)
    audit = scratch / "audit.jsonl"
    audit.touch()
    common: dict[str, object] = {"audit_file": audit, **TIMES}
    first, second = core_halves()
    with proxied(ranks) as (port, proxies):
        there = {**common, "port": port, "advertise_port": proxies[0].port}
        prefill = sglang_server("sglang-prefill", options, PREFILL, first, transport=there, tp_size=ranks)
        decode = sglang_server(
            "sglang-decode", options, DECODE, second, transport={**common, "backend": "tcp"}, tp_size=ranks,
            extra=("--disaggregation-decode-enable-radix-cache",),
        )  # fmt: skip
        alone = sglang_server("sglang-alone", options, None, second)
        with running(prefill, decode, alone):
            servers = SglangServers(prefill, decode, alone, proxies, audit)
            prompt = prompt_of(300)
            if not servers.is_right(prompt, servers.handed_over(prompt)):
                raise ServerError("a hand-over without any fault is not right")
            yield servers
