# SPDX-License-Identifier: Apache-2.0
"""Real `vllm serve` and `vllm-router` processes, and how they are asked."""

from __future__ import annotations

import http.client
import json
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.launch.process import Process, ServerError, console_script

#: What a router asks a prefill server for, by ``kv_transfer_params``.
PREFILL_PARAMS = {"do_remote_decode": True, "do_remote_prefill": False}


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
    *,
    host: str = "127.0.0.1",
    prefix: Sequence[str] = (),
) -> Process:
    """A `vllm serve`, not yet started. ``kv_transfer_config``: a bare word, an object, or none.

    ``prefix`` takes the command to ``host``, if that is none of this network namespace.
    """
    port = free_port()
    vllm = str(options.scripts / "vllm") if options.scripts else console_script("vllm")
    command = [
        vllm, "serve", str(options.model), "--host", host, "--port", str(port),
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
    log = options.directory / f"{name}.log"
    return Process(name, command, port, log, env, cores, host=host, prefix=prefix)


def router(
    prefill: Process,
    decode: Process,
    directory: Path,
    *,
    dispatch: str = "concurrent",
    bootstrap_port: int | None = None,
) -> Process:
    """vLLM's own router in front of two servers.

    ``dispatch``: concurrent asks both at once, from the second request on; sequential asks prefill first, always, and
    needs its ``bootstrap_port``. Raises ValueError without one.
    """
    port = free_port()
    # The router's names of two of its modes. In both it asks prefill first as long as it knows nothing of it.
    mode = {"concurrent": "nixl", "sequential": "mooncake"}[dispatch]
    if dispatch == "sequential" and bootstrap_port is None:
        raise ValueError("bootstrap_port is None, must be prefill's: a sequential router asks it")
    bootstrap = [str(bootstrap_port)] if dispatch == "sequential" else []
    command = [
        console_script("vllm-router"), "--vllm-pd-disaggregation", "--kv-connector", mode,
        "--prefill", prefill.url, *bootstrap, "--decode", decode.url,
        "--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin",
        "--prometheus-port", str(free_port()), "--disable-retries",
    ]  # fmt: skip
    return Process(f"router-{dispatch}", command, port, directory / f"router-{dispatch}.log")


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
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """Greedy completion of prompt token ids. Raises ServerError for any answer but a good one."""
    body: dict[str, Any] = {
        "model": "model", "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0,
        "ignore_eos": True, "return_token_ids": True, "stream": stream,
    }  # fmt: skip
    if kv_transfer_params is not None:
        body["kv_transfer_params"] = kv_transfer_params
    begun = time.perf_counter()
    with _asked(url, body, timeout_s, headers) as response:
        if not stream:
            answer = json.loads(response.read())
            total = time.perf_counter() - begun
            return Answer(
                answer["choices"][0].get("token_ids") or [], total, total, answer.get("kv_transfer_params")
            )
        return _read_stream(response, begun)


#: By so much, in log-probability, a server must prefer each token of its answer to be sure of it.
SURE = 0.1


class Judged(NamedTuple):
    """A greedy answer, and by how much the first token leads the second, in log-probability, where it leads least."""

    token_ids: list[int]
    margin: float

    @property
    def sure(self) -> bool:
        """Whether another answer is wrong; else rounding may decide, which depends on what else is in a step."""
        return self.margin > SURE


def judged(url: str, prompt: Sequence[int], max_tokens: int) -> Judged:
    """What the server answers, and how sure of it it is. Raises ServerError."""
    body = {
        "model": "model",
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    with _asked(url, body | {"logprobs": 2, "return_tokens_as_token_ids": True}, 300.0) as response:
        choice = json.loads(response.read())["choices"][0]
    leads = [sorted(step.values(), reverse=True) for step in choice["logprobs"]["top_logprobs"]]
    return Judged(choice["token_ids"], float(min(first - second for first, second, *_ in leads)))


@contextmanager
def _asked(
    url: str, body: dict[str, Any], timeout_s: float, headers: Mapping[str, str] | None = None
) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=timeout_s)
    try:
        sent = {"Content-Type": "application/json", **(headers or {})}
        connection.request("POST", "/v1/completions", json.dumps(body), sent)
        response = connection.getresponse()
        if response.status != 200:
            said = response.read(2000).decode(errors="replace")
            raise ServerError(f"{url} answered {response.status}: {said}")
        yield response
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
    """One of our metrics at a server's /metrics, summed over its engines and codes; 0 before the first step."""
    return metric(server, *(f"vllm:sage_kvt_{name}{ending}" for ending in ("", "_total")))


def metric(server: Process, *names: str) -> float:
    """The sum of all samples of these names at a server's /metrics; 0 where there are none."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    starts = tuple(f"{name}{{" for name in names)
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(starts))
