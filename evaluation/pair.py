# SPDX-License-Identifier: Apache-2.0
"""A running prefill/decode pair for one way of sending KV, and what decode answers to a prompt that was handed over."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.kv_change import KVChange
from sage_kv_connector.launch.process import Process, ServerError, core_halves, running
from sage_kv_connector.launch.vllm import PREFILL_PARAMS, VllmOptions, gauge, vllm_server

ROOT = Path(__file__).resolve().parent.parent
PLUGINS = ROOT / "evaluation" / "plugins"
CHANGE_VARIABLE = "SAGE_KVT_EVALUATION_KV"
#: Seconds that nothing of a pair is given up in: both may be stopped for long, and go on.
PATIENCE_S = 7200
#: Most likely next tokens that decode tells beside the one it took.
TOP = 64
#: Seconds that counters may take to show what was done.
COUNTED_S = 60.0


@dataclass(frozen=True)
class Arm:
    """One way of sending KV.

    ``target_dtype``: the connector's option of decode. ``decode_cache``: decode's ``--kv-cache-dtype``. ``changes``: what
    the plugin does to KV of (prefill, decode).
    """

    name: str
    target_dtype: str = "auto"
    decode_cache: str = "auto"
    changes: tuple[KVChange | None, KVChange | None] = (None, None)

    @property
    def emulated(self) -> bool:
        """Its bytes on the wire are not those of the format that it stands for."""
        return any(self.changes)


class Step(NamedTuple):
    """One token of decode: its id, its log-probability, and those of the most likely ones by id."""

    token: int
    logprob: float
    top: dict[int, float]


class Counts(NamedTuple):
    """What a pair's metrics say. Tokens and bytes are those that decode received."""

    hand_overs: int
    tokens: int
    wire_bytes: int
    cache_bytes: int
    recomputed_tokens: int
    failed_loads: int

    def since(self, before: Counts) -> Counts:
        return Counts(*(now - then for now, then in zip(self, before, strict=True)))


class Pair:
    """Both servers of a running pair."""

    def __init__(self, prefill: Process, decode: Process) -> None:
        self.prefill, self.decode = prefill, decode

    def hand_over(
        self, prompt: Sequence[int], *, forced: Sequence[int] = (), tokens: int = 1, stop: Sequence[int] = ()
    ) -> list[Step]:
        """What decode generates over KV from prefill: greedy, up to ``tokens`` tokens, or those of ``forced``.

        Greedy generation ends before a token of ``stop``. Raises ServerError.
        """
        asked = {"prompt": list(prompt), "max_tokens": 1, "kv_transfer_params": PREFILL_PARAMS}
        params = _complete(self.prefill, asked)["kv_transfer_params"]
        if not params:
            raise ServerError(f"{self.prefill.name} handed over nothing of a prompt of {len(prompt)} tokens")
        asked = {"prompt": list(prompt), "max_tokens": len(forced) or tokens, "kv_transfer_params": params}
        asked |= {"logprobs": TOP, "return_tokens_as_token_ids": True, "ignore_eos": not stop}
        asked |= {"stop_token_ids": list(stop)} if stop else {}
        asked |= {"vllm_xargs": {"forced_tokens": list(forced)}} if forced else {}
        said = _complete(self.decode, asked)["choices"][0]["logprobs"]
        steps = [
            Step(_id(token), logprob, {_id(other): value for other, value in top.items()})
            for token, logprob, top in zip(said["tokens"], said["token_logprobs"], said["top_logprobs"], strict=True)
        ]
        if forced and [step.token for step in steps] != list(forced):
            raise ServerError(f"{self.decode.name} was told {list(forced)} and took {[s.token for s in steps]}")
        return steps

    def counts(self) -> Counts:
        """Of all hand-overs so far. Raises OSError."""
        self._flush()
        external = _sample(self.decode, "vllm:prompt_tokens_by_source_total", 'source="external_kv_transfer"')
        return Counts(
            int(_sample(self.decode, "vllm:sage_kvt_transfers_total", 'side="decode"', 'code="ok"')),
            int(external),
            int(_sample(self.decode, "vllm:sage_kvt_transferred_bytes_total", 'side="decode"')),
            int(_sample(self.decode, "vllm:sage_kvt_kv_bytes_total", 'side="decode"')),
            int(gauge(self.decode, "recomputed_tokens")),
            int(gauge(self.decode, "failed_loads")),
        )

    def counted(self, before: Counts, hand_overs: int) -> Counts:
        """What was counted since ``before``, once that many hand-overs were, or at last."""
        until = time.monotonic() + COUNTED_S
        while (done := self.counts().since(before)).hand_overs < hand_overs and time.monotonic() < until:
            time.sleep(0.2)
        return done

    def _flush(self) -> None:
        """Counters come to /metrics with a step."""
        _complete(self.decode, {"prompt": [5, 6], "max_tokens": 1})


@contextmanager
def running_pair(arm: Arm, model: Path, most_tokens: int, directory: Path) -> Iterator[Pair]:
    """Start both servers, and stop them. Raises ServerError where one does not start."""
    times = ",".join(
        f"{name}={PATIENCE_S}"
        for name in ("lease_s", "deadline_s", "peer_timeout_s", "unmatched_timeout_s", "connect_timeout_s")
    )
    servers = []
    roles = ("prefill", f"sage_kvt:host=127.0.0.1,{times}"), (
        "decode",
        f"sage_kvt:host=127.0.0.1,target_dtype={arm.target_dtype},{times}",
    )
    for (role, words), change, cores in zip(roles, arm.changes, core_halves(), strict=True):
        env = {
            "PYTHONPATH": os.pathsep.join([str(PLUGINS), str(ROOT), os.environ.get("PYTHONPATH", "")]),
            CHANGE_VARIABLE: change.to_json() if change else "",
            "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(PATIENCE_S),
            "VLLM_RPC_TIMEOUT": str(PATIENCE_S * 1000),
        }
        extra = (
            "--dtype", "bfloat16", "--max-num-batched-tokens", str(most_tokens), "--no-enable-prefix-caching",
            "--no-async-scheduling", "--max-logprobs", str(TOP), "--max-num-seqs", "16",
            *(("--kv-cache-dtype", arm.decode_cache) if role == "decode" else ()),
        )  # fmt: skip
        options = VllmOptions(model, directory, most_tokens, extra=extra, env=env)
        servers.append(vllm_server(f"{arm.name}-{role}", options, words, cores))
    with running(*servers):
        yield Pair(*servers)


def _id(token: str) -> int:
    return int(token.removeprefix("token_id:"))


def _sample(server: Process, name: str, *labels: str) -> float:
    """The sum of a metric's samples with these labels at a server's /metrics."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=PATIENCE_S) as response:
        lines = response.read().decode().splitlines()
    with_labels = [line for line in lines if line.startswith(f"{name}{{") and all(map(line.__contains__, labels))]
    return sum(float(line.rpartition(" ")[2]) for line in with_labels)


def _complete(server: Process, asked: dict[str, Any]) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
    try:
        body = json.dumps({"model": "model", "temperature": 0, **asked})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        said = response.read()
        if response.status != 200:
            raise ServerError(f"{server.name} answered {response.status}: {said[:2000].decode(errors='replace')}")
        answer: dict[str, Any] = json.loads(said)
        return answer
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(f"{server.name}: {type(error).__name__}: {error}") from error
    finally:
        connection.close()
