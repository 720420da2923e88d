# SPDX-License-Identifier: Apache-2.0
"""Real `vllm serve` and `vllm-router` processes: start, wait, ask, stop; nothing is left behind."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sage_kv_connector.console import progress

START_TIMEOUT_S = 300.0
LOG_TAIL_LINES = 30


class ServerError(RuntimeError):
    """A process did not start or ended; the message holds the tail of its log."""


_issued: set[int] = set()


def free_port() -> int:
    """A port that nobody listens on, outside the range from which outgoing connections take theirs."""
    while True:
        port = random.randint(20000, 32000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("0.0.0.0", port))
            if port not in _issued:
                _issued.add(port)
                return port


@dataclass
class Process:
    """A child in a process group of its own, its log in a file."""

    name: str
    command: Sequence[str]
    port: int
    log: Path
    env: dict[str, str] = field(default_factory=dict)
    cores: str | None = None
    popen: subprocess.Popen[bytes] | None = None
    health: str = "/health"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = list(self.command)
        if self.cores is not None and shutil.which("taskset"):
            command = ["taskset", "-c", self.cores, *command]
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **self.env},
                start_new_session=True,
            )

    def wait_until_healthy(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Raises ServerError when it ends, or is not healthy in time."""
        until = time.monotonic() + timeout_s
        while True:
            if self.popen is None or self.popen.poll() is not None:
                raise ServerError(f"{self.name} ended while it started; its log ends with\n{self.log_tail()}")
            if _answers(self.port, self.health):
                return
            if time.monotonic() > until:
                raise ServerError(f"{self.name} was not healthy after {timeout_s:.0f} s:\n{self.log_tail()}")
            time.sleep(0.25)

    def stop(self, how: int = signal.SIGTERM, timeout_s: float = 20.0) -> None:
        """End the whole group; SIGKILL what is left after ``timeout_s``."""
        if self.popen is None:
            return
        _signal_group(self.popen.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(timeout_s)
        _signal_group(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        self.popen = None

    def log_tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def pids(self) -> list[int]:
        """Every process of the group."""
        if self.popen is None:
            return []
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError, ValueError):
                    stat = (entry / "stat").read_text()
                    if int(stat.rpartition(")")[2].split()[2]) == self.popen.pid:
                        found.append(int(entry.name))
        return found


def _signal_group(pid: int, how: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, how)


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@dataclass(frozen=True)
class VllmOptions:
    """What the servers of one run have in common."""

    model: Path
    directory: Path
    max_model_len: int | None = 16384  #: none: what the model says
    kv_cache_gib: int = 1
    block_size: int | None = None
    extra: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    served_model_name: str = "model"
    scripts: Path | None = None  #: where the `vllm` command lies, if in another environment than this one


def vllm_server(
    name: str,
    options: VllmOptions,
    kv_transfer_config: str | dict[str, Any] | None,
    cores: str | None = None,
) -> Process:
    """A `vllm serve`, not yet started. ``kv_transfer_config``: a bare word, an object, or none."""
    port = free_port()
    vllm = str(options.scripts / "vllm") if options.scripts else _script("vllm")
    command = [
        vllm, "serve", str(options.model), "--host", "127.0.0.1", "--port", str(port),
        "--served-model-name", options.served_model_name, "--enforce-eager",
        *options.extra,
    ]  # fmt: skip
    if options.max_model_len is not None:
        command += ["--max-model-len", str(options.max_model_len)]
    if options.block_size is not None:
        command += ["--block-size", str(options.block_size)]
    if kv_transfer_config is not None:
        given = kv_transfer_config if isinstance(kv_transfer_config, str) else json.dumps(kv_transfer_config)
        command += ["--kv-transfer-config", given]
    env = {
        "VLLM_CPU_KVCACHE_SPACE": str(options.kv_cache_gib),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        **options.env,
    }
    if cores is not None:
        env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(len(cores.split(",")))}
    return Process(name, command, port, options.directory / f"{name}.log", env, cores)


def router(
    prefill: Process,
    decode: Process,
    directory: Path,
    *,
    mode: str = "nixl",
    bootstrap_port: int | None = None,
) -> Process:
    """vLLM's own router in front of two servers. ``mode`` is its --kv-connector (nixl | mooncake)."""
    port = free_port()
    bootstrap = [] if bootstrap_port is None else [str(bootstrap_port)]
    command = [
        _script("vllm-router"), "--vllm-pd-disaggregation", "--kv-connector", mode,
        "--prefill", prefill.url, *bootstrap, "--decode", decode.url,
        "--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin",
        "--prometheus-port", str(free_port()), "--disable-retries",
    ]  # fmt: skip
    return Process(f"router-{mode}", command, port, directory / f"router-{mode}.log")


@contextlib.contextmanager
def running(*processes: Process) -> Iterator[None]:
    """Start all, wait for all, and stop all whatever happens."""
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.wait_until_healthy()
            progress.print(f"{process.name} is up on port {process.port}")
        yield
    finally:
        for process in processes:
            process.stop()


class Answer(NamedTuple):
    """One completion. ``ttft_s``: from sending the request to the first token."""

    token_ids: list[int]
    ttft_s: float
    total_s: float
    kv_transfer_params: dict[str, Any] | None


def complete(
    url: str,
    prompt: Sequence[int],
    *,
    max_tokens: int = 16,
    kv_transfer_params: dict[str, Any] | None = None,
    stream: bool = True,
    timeout_s: float = 300.0,
) -> Answer:
    """Greedy completion of prompt token ids. Raises ServerError for any answer but a good one."""
    host = url.removeprefix("http://")
    body: dict[str, Any] = {
        "model": "model", "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0,
        "ignore_eos": True, "return_token_ids": True, "stream": stream,
    }  # fmt: skip
    if kv_transfer_params is not None:
        body["kv_transfer_params"] = kv_transfer_params
    connection = http.client.HTTPConnection(host, timeout=timeout_s)
    begun = time.perf_counter()
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise ServerError(
                f"{url} answered {response.status}: {response.read(2000).decode(errors='replace')}"
            )
        if not stream:
            answer = json.loads(response.read())
            total = time.perf_counter() - begun
            return Answer(
                answer["choices"][0].get("token_ids") or [], total, total, answer.get("kv_transfer_params")
            )
        return _read_stream(response, begun)
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(f"{url}: {type(error).__name__}: {error}") from error
    finally:
        connection.close()


def _read_stream(response: http.client.HTTPResponse, begun: float) -> Answer:
    token_ids: list[int] = []
    first = 0.0
    for raw in response:
        line = raw.decode().strip()
        if line == "data: [DONE]":
            return Answer(token_ids, first, time.perf_counter() - begun, None)
        if not line.startswith("data: "):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise ServerError(f"the stream ended with {event['error']}")
        for choice in event.get("choices", []):
            ids = choice.get("token_ids") or []
            if ids and not first:
                first = time.perf_counter() - begun
            token_ids += ids
    raise ServerError(f"the stream broke off after {len(token_ids)} tokens")


def gauge(server: Process, name: str) -> float:
    """One of our gauges at a server's /metrics, summed over its engines; 0 before the first step."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"vllm:sage_kvt_{name}{{"))


def _script(name: str) -> str:
    """A console script of this environment."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ServerError(f"{name} is not installed in this environment (see `sage-kvt doctor`)")
    return found
