# SPDX-License-Identifier: Apache-2.0
"""Real SGLang servers and sglang-router: how they are started and asked."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

from sage_kv_connector.contract.bootstrap_room import new_room
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.launch.process import Process, ServerError

#: Put on the path of servers on a machine without CUDA, see the module in it.
ON_CPU = Path(__file__).parent / "sglang_on_cpu"
#: SGLang's option values for each role.
PREFILL, DECODE = "prefill", "decode"


def build_model(directory: Path, shape_name: str) -> Path:
    """``tiny_model.build``."""
    code = (
        "import sys; from pathlib import Path; from sage_kv_connector.launch.tiny_model import build; "
        "print(build(Path(sys.argv[1]), sys.argv[2]))"
    )
    return built_by(code, str(directory), shape_name)


def built_by(code: str, *words: str) -> Path:
    """What ``code`` prints last, in a process of its own: here transformers may need the shims too."""
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=os.environ | _shims(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise ServerError(f"the model could not be built:\n{done.stderr[-2000:]}")
    return Path(done.stdout.strip().splitlines()[-1])


@dataclass(frozen=True)
class SglangOptions:
    """What the servers of one run have in common. ``env`` carries SAGE_KVT_CONFIG and the secret."""

    model: Path
    directory: Path
    context_length: int = 16384
    max_total_tokens: int = 65536
    extra: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)


@dataclass
class SglangProcess(Process):
    """``bootstrap_port``: where decode servers and routers ask for a prefill server, else 0."""

    bootstrap_port: int = 0


def sglang_server(
    name: str,
    options: SglangOptions,
    role: str | None = None,
    cores: str | None = None,
    *,
    backend: str = "sage_kvt",
    transport: dict[str, object] | None = None,
    tp_size: int = 1,
    dp_size: int = 1,
    pp_size: int = 1,
    extra: tuple[str, ...] = (),
) -> SglangProcess:
    """A server on the CPU, not yet started; ``role`` None is one that does both. ``transport``: our options."""
    port, bootstrap = free_port(), free_port() if role == PREFILL else 0
    command = [
        sys.executable, "-m", "sglang.launch_server", "--model-path", str(options.model), "--device", "cpu",
        "--attention-backend", "torch_native", "--disable-overlap-schedule", "--skip-server-warmup",
        "--sleep-on-idle",  # else a server that does nothing takes a core
        "--host", "127.0.0.1", "--port", str(port), "--context-length", str(options.context_length),
        "--max-total-tokens", str(options.max_total_tokens), "--max-running-requests", "16",
        "--tp-size", str(tp_size), "--dp-size", str(dp_size), "--pp-size", str(pp_size),
        *options.extra, *extra,
    ]  # fmt: skip
    if role is not None:
        command += ["--disaggregation-mode", role, "--disaggregation-transfer-backend", backend]
    if role == PREFILL:
        command += ["--disaggregation-bootstrap-port", str(bootstrap)]
    if role == DECODE:
        # The default keeps retracted requests in memory that is registered with CUDA.
        command += ["--disaggregation-decode-retraction-backup", "cpu_tensor"]
    words = {"host": "127.0.0.1"} | (transport or {})
    env = {
        "SGLANG_USE_CPU_ENGINE": "1",
        "HF_HUB_OFFLINE": "1",
        "SAGE_KVT_CONFIG": ",".join(f"{key}={value}" for key, value in words.items()),
        **_shims(),
        **options.env,
    }
    if cores is not None:
        env |= {"OMP_NUM_THREADS": str(len(cores.split(",")))}
    # SGLang's default wants a NUMA node for each rank.
    every = cores or ",".join(map(str, sorted(os.sched_getaffinity(0))))
    env |= {"SGLANG_CPU_OMP_THREADS_BIND": "|".join([every] * (tp_size * dp_size * pp_size))}
    log = options.directory / f"{name}.log"
    return SglangProcess(name, command, port, log, env, cores, bootstrap_port=bootstrap)


def sglang_router(prefill: SglangProcess, decode: Process, directory: Path) -> Process:
    """SGLang's own router in front of two servers; it sends a request to both at once."""
    port = free_port()
    command = [
        sys.executable, "-m", "sglang_router.launch_router", "--pd-disaggregation",
        "--prefill", prefill.url, str(prefill.bootstrap_port), "--decode", decode.url,
        "--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin",
        "--prometheus-port", str(free_port()), "--disable-retries",
    ]  # fmt: skip
    return Process(
        "sglang-router", command, port, directory / "sglang-router.log", _shims(), health="/readiness"
    )


def _shims() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(ON_CPU), os.environ.get("PYTHONPATH", "")]))}


class Generated(NamedTuple):
    """``ttft_s``: from sending the request to the first token."""

    token_ids: list[int]
    ttft_s: float


def generate(
    url: str,
    prompt: Sequence[int],
    *,
    max_tokens: int = 16,
    bootstrap: dict[str, Any] | None = None,
    stream: bool = True,
    timeout_s: float = 120.0,
) -> Generated:
    """Greedy continuation of token ids. Raises ServerError for any answer but a good one."""
    body = {
        "input_ids": list(prompt),
        "sampling_params": {"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True},
        "stream": stream,
        **(bootstrap or {}),
    }
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=timeout_s)
    begun = time.perf_counter()
    try:
        connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            text = response.read(2000).decode(errors="replace")
            raise ServerError(f"{url} answered {response.status}: {text}")
        if not stream:
            answer = json.loads(response.read())
            _refuse_aborted(answer)
            return Generated(answer["output_ids"], time.perf_counter() - begun)
        return _read_events(response, begun)
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(f"{url}: {type(error).__name__}: {error}") from error
    finally:
        connection.close()


def room_at(bootstrap_port: int) -> dict[str, Any]:
    """The three fields of a new request whose prefill is asked for at this port."""
    return {"bootstrap_host": "127.0.0.1", "bootstrap_port": bootstrap_port, "bootstrap_room": new_room()}


def generate_on_pair(
    prefill: SglangProcess,
    decode: Process,
    prompt: Sequence[int],
    *,
    max_tokens: int = 16,
    timeout_s: float = 120.0,
) -> Generated:
    """Both requests at once, as a router sends them; decode's answer. Raises what decode's raised."""
    bootstrap = room_at(prefill.bootstrap_port)

    def ask_prefill() -> None:
        try:
            generate(prefill.url, prompt, max_tokens=max_tokens, bootstrap=bootstrap, timeout_s=timeout_s)
        except ServerError:
            pass  # decode's answer says it too

    beside = Thread(target=ask_prefill)
    beside.start()
    try:
        return generate(decode.url, prompt, max_tokens=max_tokens, bootstrap=bootstrap, timeout_s=timeout_s)
    finally:
        beside.join()


def _refuse_aborted(event: dict[str, Any]) -> None:
    """SGLang ends a request that failed under way with status 200 and this reason."""
    reason = event.get("meta_info", {}).get("finish_reason") or {}
    if reason.get("type") == "abort":
        raise ServerError(f"the request was aborted: {reason.get('message')}")


def _read_events(response: http.client.HTTPResponse, begun: float) -> Generated:
    """Events carry all token ids so far."""
    token_ids: list[int] = []
    first = 0.0
    for raw in response:
        line = raw.decode().strip()
        if line == "data: [DONE]":
            return Generated(token_ids, first)
        if not line.startswith("data: "):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise ServerError(f"the stream ended with {event['error']}")
        _refuse_aborted(event)
        token_ids = event.get("output_ids") or token_ids
        if token_ids and not first:
            first = time.perf_counter() - begun
    raise ServerError(f"the stream broke off after {len(token_ids)} tokens")
