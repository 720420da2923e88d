# SPDX-License-Identifier: Apache-2.0
"""A prefill and a decode engine of vLLM over ``backend=rdma``, where there is a device: the same tokens, by the card.

    python -m integration_tests.rdma.vllm_pair MODEL HOST [BACKEND]

Offline engines, each in a process of its own without servers around it: an emulated processor takes minutes to import
vLLM, which happens once here. Prints one JSON object: ``prompts``, ``right``, ``ways`` (how KV went), ``bytes``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import secrets
import sys
from multiprocessing.connection import Connection
from typing import Any

from integration_tests.cluster import PREFILL_PARAMS, new_prompt
from sage_kv_connector.config import SECRET_ENV

LENGTHS = (16, 129, 700, 900)
TOKENS = 4
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def engine(model: str, options: dict[str, Any], asked: Connection) -> None:
    """Answers (prompt, parameters, tokens) with (token ids, parameters), and "" with how KV went."""
    from vllm import LLM, SamplingParams

    from sage_kv_connector.telemetry.reading import sources

    word = "sage_kvt:" + ",".join(f"{name}={value}" for name, value in options.items())
    llm = LLM(
        model,
        enforce_eager=True,
        dtype="float32",
        max_model_len=1024,
        num_gpu_blocks_override=64,
        distributed_executor_backend="uni",
        disable_log_stats=True,
        kv_transfer_config=word,
    )
    asked.send("up")
    while (given := asked.recv()) is not None:
        if given == "":
            snapshots = [one for one in sources.local().snapshots if one.process == os.getpid()]
            links = [link for one in snapshots for link in one.links]
            landed = sum(one.value("link_bytes_total", direction="landed") for one in snapshots)
            asked.send((sorted({f"{link.backend} ({link.mode})" for link in links}), landed))
            continue
        prompt, params, tokens = given
        extra = {"kv_transfer_params": params} if params else None
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=extra)
        (answer,) = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
        asked.send((list(answer.outputs[0].token_ids), answer.kv_transfer_params))


def handed_over(model: str, host: str, backend: str) -> dict[str, Any]:
    """Each prompt is prefilled by one engine and decoded by the other; the first one alone is the judge."""
    os.environ |= ENVIRONMENT
    os.environ.setdefault(SECRET_ENV, secrets.token_urlsafe(16))
    # A slow machine is not a broken one.
    options = {
        "backend": backend,
        "host": host,
        "security": "none",
        "integrity": "crc",
        "connect_timeout_s": 60,
    }
    import vllm  # noqa: F401 - once, for both

    fork = multiprocessing.get_context("fork")
    sides = []
    for _ in range(2):
        ours, theirs = fork.Pipe()
        process = fork.Process(target=engine, args=(model, options, theirs), daemon=True)
        process.start()
        sides.append(ours)
    prefill, decode = sides
    for side in sides:
        assert side.recv() == "up"

    def ask(side: Connection, *what: Any) -> Any:
        side.send(what)
        return side.recv()

    right = 0
    for length in LENGTHS:
        prompt = new_prompt(length)
        _, params = ask(prefill, prompt, PREFILL_PARAMS, 1)
        answer, _ = ask(decode, prompt, params, TOKENS)
        alone, _ = ask(prefill, prompt, None, TOKENS)
        right += answer == alone
    decode.send("")
    ways, landed = decode.recv()
    return {"prompts": len(LENGTHS), "right": right, "ways": ways, "bytes": landed}


if __name__ == "__main__":
    given = sys.argv[1:]
    if not 2 <= len(given) <= 3:
        sys.exit(__doc__)
    print(json.dumps(handed_over(given[0], given[1], given[2] if len(given) > 2 else "rdma")))
