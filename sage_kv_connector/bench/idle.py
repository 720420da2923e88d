# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench idle``: CPU that idle vLLM servers take with our connector, and without one."""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sage_kv_connector.config import SECRET_ENV
from sage_kv_connector.console import progress
from sage_kv_connector.launch.process import Process, core_halves, running
from sage_kv_connector.launch.tiny_model import build
from sage_kv_connector.launch.vllm import PREFILL_PARAMS, VllmOptions, complete, vllm_server

#: vLLM's own processes poll for a while after their last request.
SETTLE_S = 15.0
PROMPT = list(range(1, 200))


def bench_idle(seconds: float) -> dict[str, Any]:
    """Two servers with the connector, an open session between them, and one without; then nothing happens."""
    with tempfile.TemporaryDirectory(prefix="sage-kvt-bench-") as name:
        directory = Path(name)
        env = {SECRET_ENV: secrets.token_urlsafe(16)}
        options = VllmOptions(build(directory, "small"), directory, 1024, env=env)
        cores = core_halves()
        prefill = vllm_server("prefill", options, "sage_kvt:host=127.0.0.1", cores[0])
        decode = vllm_server("decode", options, "sage_kvt:host=127.0.0.1", cores[1])
        plain = vllm_server("plain", options, None, cores[1])
        with running(prefill, decode, plain):
            first = complete(
                prefill.url, PROMPT, max_tokens=1, kv_transfer_params=PREFILL_PARAMS, stream=False
            )
            complete(decode.url, PROMPT, max_tokens=8, kv_transfer_params=first.kv_transfer_params)
            complete(plain.url, PROMPT, max_tokens=8)
            progress.print(f"a session is open; measuring {seconds:.0f} s after {SETTLE_S:.0f} s of rest")
            time.sleep(SETTLE_S)
            servers = {"prefill": prefill, "decode": decode, "without connector": plain}
            before = {name: cpu_seconds(server) for name, server in servers.items()}
            ours_before = connector_cpu_seconds(prefill) + connector_cpu_seconds(decode)
            time.sleep(seconds)
            cpu = {name: cpu_seconds(server) - before[name] for name, server in servers.items()}
            ours = connector_cpu_seconds(prefill) + connector_cpu_seconds(decode) - ours_before
    return {"seconds": seconds, "server_cpu_s": cpu, "connector_threads_cpu_s": ours}


def idle_rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The result as a table for people."""
    for name, cpu in result["server_cpu_s"].items():
        yield f"server, {name}", f"{cpu:.2f} s of CPU in {result['seconds']:.0f} s"
    yield "threads of the connector, both servers", f"{result['connector_threads_cpu_s']:.2f} s"


def cpu_seconds(server: Process) -> float:
    """User and system time of all processes of a server."""
    return sum(_ticks(Path(f"/proc/{pid}/stat")) for pid in server.pids()) / os.sysconf("SC_CLK_TCK")


def connector_cpu_seconds(server: Process) -> float:
    """Of our own threads alone, which are named sage-kvt-…."""
    ticks = 0
    for pid in server.pids():
        for task in Path(f"/proc/{pid}/task").iterdir():
            if (task / "comm").read_text().startswith("sage-kvt"):
                ticks += _ticks(task / "stat")
    return ticks / os.sysconf("SC_CLK_TCK")


def _ticks(stat: Path) -> int:
    fields = stat.read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
