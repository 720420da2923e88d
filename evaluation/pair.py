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
from sage_kv_connector.launch.process import Process, ServerError, core_halves
from sage_kv_connector.launch.vllm import PREFILL_PARAMS, VllmOptions, gauge, vllm_server

ROOT = Path(__file__).resolve().parent.parent
PLUGINS = ROOT / "evaluation" / "plugins"
CHANGE_VARIABLE = "SAGE_KVT_EVALUATION_KV"
#: Seconds that nothing of a pair is given up in: both may be stopped for long, and go on.
PATIENCE_S = 7200
TIMES = ("lease", "deadline", "peer_timeout", "unmatched_timeout", "connect_timeout")
#: Memory of prefill's cache, so that it still knows one pair's prompts when the next one asks.
PREFILL_GIB = 2
#: Most likely next tokens that decode tells beside the one it took.
TOP = 64
#: Seconds that counters may take to show what was done.
COUNTED_S = 60.0
#: Requests of a pair under way; one pass of prefill must be able to take all of them.
AT_ONCE = 4
#: Tokens of a page: the smallest that vLLM's vector kernels take, so that short prompts share what they begin with.
BLOCK_SIZE = 32


@dataclass(frozen=True)
class Arm:
    """One way of sending KV.

    ``target_dtype``: the connector's option of decode. ``decode_cache``: decode's ``--kv-cache-dtype``. ``changes``:
    what the plugin does to KV of (prefill, decode).
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


NOTHING = Counts(0, 0, 0, 0, 0, 0)


class Pair:
    """Both servers of a running pair."""

    def __init__(self, prefill: Process, decode: Process) -> None:
        self.prefill, self.decode = prefill, decode

    def hand_over(
        self,
        prompt: Sequence[int],
        *,
        forced: Sequence[int] = (),
        tokens: int = 1,
        stop: Sequence[int] = (),
        wanted: Sequence[int] = (),
    ) -> list[Step]:
        """What decode generates over KV from prefill: greedy, up to ``tokens`` tokens, or those of ``forced``.

        Greedy generation ends before a token of ``stop``. ``wanted``: tokens, up to 128, that ``top`` of each step has
        instead of the most likely ones. Raises ServerError.
        """
        asked = {"prompt": list(prompt), "max_tokens": 1, "kv_transfer_params": PREFILL_PARAMS}
        params = _complete(self.prefill, asked)["kv_transfer_params"]
        if not params:
            raise ServerError(f"{self.prefill.name} handed over nothing of a prompt of {len(prompt)} tokens")
        asked = {"prompt": list(prompt), "max_tokens": len(forced) or tokens, "kv_transfer_params": params}
        asked |= {"logprobs": TOP, "return_tokens_as_token_ids": True, "ignore_eos": not stop}
        asked |= {"logprob_token_ids": list(wanted), "logprobs": len(wanted)} if wanted else {}
        asked |= {"stop_token_ids": list(stop)} if stop else {}
        asked |= {"vllm_xargs": {"forced_tokens": list(forced)}} if forced else {}
        said = _complete(self.decode, asked)["choices"][0]["logprobs"]
        steps = [
            Step(_id(token), logprob, {_id(other): value for other, value in top.items()})
            for token, logprob, top in zip(
                said["tokens"], said["token_logprobs"], said["top_logprobs"], strict=True
            )
        ]
        if forced and [step.token for step in steps] != list(forced):
            raise ServerError(
                f"{self.decode.name} was told {list(forced)} and took {[s.token for s in steps]}"
            )
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


class Pairs:
    """Runs one pair after the other. Prefill stays up for the next one where it is the same: it knows their prompts."""

    def __init__(self, directory: Path) -> None:
        """``directory``: takes the servers' logs."""
        self._directory = directory
        self._prefill: Process | None = None
        self._prefill_is: object = None

    def __enter__(self) -> Pairs:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop_prefill()

    @contextmanager
    def pair(self, arm: Arm, model: Path, most_tokens: int) -> Iterator[Pair]:
        """Start what does not run yet, and stop decode. Raises ServerError where one does not start."""
        changed, written = arm.changes
        if (wanted := (model, changed, most_tokens)) != self._prefill_is:
            self._stop_prefill()
            self._prefill = self._server("prefill", model, most_tokens, "sage_kvt:host=127.0.0.1", changed)
            self._prefill_is = wanted
            self._prefill.start()
        assert self._prefill is not None
        words = f"sage_kvt:host=127.0.0.1,target_dtype={arm.target_dtype}"
        decode = self._server(
            "decode", model, most_tokens, words, written, "--kv-cache-dtype", arm.decode_cache
        )
        try:
            decode.start()
            for server in (self._prefill, decode):
                server.wait_until_healthy(PATIENCE_S)
            yield Pair(self._prefill, decode)
        finally:
            decode.stop()

    def _stop_prefill(self) -> None:
        if self._prefill is not None:
            self._prefill.stop()
        self._prefill_is = None

    def _server(
        self, role: str, model: Path, most_tokens: int, words: str, change: KVChange | None, *extra: str
    ) -> Process:
        env = {
            "PYTHONPATH": os.pathsep.join([str(PLUGINS), str(ROOT), os.environ.get("PYTHONPATH", "")]),
            CHANGE_VARIABLE: change.to_json() if change else "",
            "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(PATIENCE_S),
        }
        # Decode must be handed everything. Prefill may know it, unless what it knows was changed after it was used.
        caching = role == "prefill" and change is None
        extra = (
            "--dtype", engine_dtype(), "--max-num-batched-tokens", str(AT_ONCE * most_tokens),
            "--enable-prefix-caching" if caching else "--no-enable-prefix-caching",
            "--no-async-scheduling", "--max-logprobs", str(TOP), "--max-num-seqs", "16", *extra,
        )  # fmt: skip
        size = PREFILL_GIB if caching else 1
        options = VllmOptions(model, self._directory, most_tokens, size, BLOCK_SIZE, extra=extra, env=env)
        times = "".join(f",{name}_s={PATIENCE_S}" for name in TIMES)
        return vllm_server(f"accuracy-{role}", options, words + times, core_halves()[role == "decode"])


def cpu_flags() -> set[str]:
    """What this CPU can do, in Linux's words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}


def engine_dtype() -> str:
    """What both servers compute and cache in: float32 where the CPU has no bf16, as that is then six times as fast.

    All formats go over the wire as they would from bf16: elements are rounded to the wire's dtype once.
    """
    return "bfloat16" if cpu_flags() & {"avx512_bf16", "amx_bf16"} else "float32"


def has_fp8_cache() -> bool:
    """Whether vLLM keeps an fp8 cache on this CPU."""
    return bool(cpu_flags() & {"avx512f", "amx_tile"})


def _id(token: str) -> int:
    return int(token.removeprefix("token_id:"))


def _sample(server: Process, name: str, *labels: str) -> float:
    """The sum of a metric's samples with these labels at a server's /metrics."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=PATIENCE_S) as response:
        lines = response.read().decode().splitlines()
    with_labels = [
        line for line in lines if line.startswith(f"{name}{{") and all(map(line.__contains__, labels))
    ]
    return sum(float(line.rpartition(" ")[2]) for line in with_labels)


def _complete(server: Process, asked: dict[str, Any]) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
    try:
        body = json.dumps({"model": "model", "temperature": 0, **asked})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        said = response.read()
        if response.status != 200:
            raise ServerError(
                f"{server.name} answered {response.status}: {said[:2000].decode(errors='replace')}"
            )
        answer: dict[str, Any] = json.loads(said)
        return answer
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(f"{server.name}: {type(error).__name__}: {error}") from error
    finally:
        connection.close()
