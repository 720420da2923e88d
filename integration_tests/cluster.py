# SPDX-License-Identifier: Apache-2.0
"""One prefill server, a decode server over shm and one over tcp through a harmful proxy; what they hold."""

from __future__ import annotations

import json
import random
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from integration_tests.tcp_proxy import TcpProxy
from sage_kv_connector.launch.process import Process
from sage_kv_connector.launch.vllm import Answer, complete

PREFILL_PARAMS = {"do_remote_decode": True, "do_remote_prefill": False}
#: Leases and deadlines of the test servers: short, so that what hangs on them is seen.
TIMES = {"lease_s": 8, "deadline_s": 20, "peer_timeout_s": 6, "unmatched_timeout_s": 8}


def bare_word(**options: Any) -> str:
    """What a test server is started with: the connector's word with these options, on loopback, with ``TIMES``."""
    given = {"host": "127.0.0.1", **options, **TIMES}
    return "sage_kvt:" + ",".join(f"{key}={value}" for key, value in given.items())


@dataclass
class Cluster:
    """The servers of most tests, started once."""

    model: Path
    prefill: Process
    decode_shm: Process
    decode_tcp: Process
    sequential: Process  #: router that asks prefill first
    concurrent: Process  #: router that asks both at once, and has heard of prefill
    proxy: TcpProxy
    audit: Path
    bootstrap: str  #: address of the prefill's bootstrap server

    def hand_over(self, decode: Process, prompt: list[int], max_tokens: int = 8) -> Answer:
        """Both requests, as a sequential router sends them."""
        return complete(decode.url, prompt, max_tokens=max_tokens, kv_transfer_params=self.prefilled(prompt))

    def prefilled(self, prompt: list[int]) -> dict[str, Any]:
        """Have the prompt prefilled; returns what decode must be sent."""
        first = complete(
            self.prefill.url, prompt, max_tokens=1, kv_transfer_params=PREFILL_PARAMS, stream=False
        )
        assert first.kv_transfer_params is not None
        return first.kv_transfer_params

    def alone(self, prompt: list[int], max_tokens: int = 8) -> list[int]:
        """Token ids of one server that computes everything itself."""
        return complete(self.prefill.url, prompt, max_tokens=max_tokens).token_ids

    def audited(self, transfers: int) -> list[dict[str, Any]]:
        """Wait for both sides' records of the last transfers, oldest first; empties the file."""
        records: list[dict[str, Any]] = []

        def complete_records() -> bool:
            records[:] = [json.loads(line) for line in self.audit.read_text().splitlines()]
            return len(records) >= 2 * transfers

        wait_until(complete_records, 10.0, lambda: f"{len(records)} audit records of {2 * transfers}")
        self.audit.write_text("")
        return records


def learn(concurrent: Process, requests: int = 1) -> None:
    """Let a router that asks both servers at once hear of its prefill's ranks, which it asks first until then."""
    for _ in range(requests):
        complete(concurrent.url, new_prompt(16), max_tokens=1)


def new_prompt(tokens: int, seed: int | None = None) -> list[int]:
    """Random bytes: no two prompts share a prefix."""
    source = random.Random(seed)
    return [source.randint(1, 255) for _ in range(tokens)]


def wait_until(
    condition: Callable[[], bool], timeout_s: float, what: Callable[[], str] = lambda: "it did not happen"
) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            raise AssertionError(f"after {timeout_s} s: {what()}")
        time.sleep(0.1)


def gauges(process: Process) -> dict[str, float]:
    """sage_kvt's metrics, summed over codes and engines, and vLLM's use of its block pool, from /metrics."""
    with urllib.request.urlopen(f"{process.url}/metrics", timeout=10) as response:
        text = response.read().decode()
    found = re.findall(r"^vllm:(sage_kvt_\w+|kv_cache_usage_perc)\{[^}]*\} (\S+)$", text, re.MULTILINE)
    sums: Counter[str] = Counter()
    for name, value in found:
        sums[name.removeprefix("sage_kvt_").removesuffix("_total")] += float(value)  # type: ignore[assignment]
    return dict(sums)


def holdings(process: Process) -> dict[str, int]:
    """What the server's processes hold of the system, all summed up."""
    fds = threads = 0
    for pid in process.pids():
        try:
            fds += len(list(Path(f"/proc/{pid}/fd").iterdir()))
            threads += len(list(Path(f"/proc/{pid}/task").iterdir()))
        except OSError:
            continue
    return {"fds": fds, "threads": threads}


def shared_memory_files() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def settled_gauges(process: Process) -> dict[str, float]:
    """Gauges after a step that follows everything in flight; vLLM reports them with a step only."""
    complete(process.url, new_prompt(16), max_tokens=2)
    time.sleep(0.3)
    complete(process.url, new_prompt(16), max_tokens=2)
    time.sleep(0.3)
    return gauges(process)
