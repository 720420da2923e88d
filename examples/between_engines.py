# SPDX-License-Identifier: Apache-2.0
"""Prefill in one engine, decode in another: one completion through a vLLM and an SGLang server, either way round.

    python examples/between_engines.py vllm http://127.0.0.1:8100 8998 sglang http://127.0.0.1:30001 "Once upon a time"

The port is that of the bootstrap server on prefill's host: vLLM's option ``bootstrap_port``, SGLang's
``--disaggregation-bootstrap-port``. Both servers must serve the same model.
"""

from __future__ import annotations

import json
import random
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit


def body(engine: str, role: str, room: dict[str, Any]) -> dict[str, Any]:
    """SGLang takes the room as fields of the request, vLLM inside of kv_transfer_params."""
    if engine == "sglang":
        return room
    return {
        "kv_transfer_params": {
            "do_remote_decode": role == "prefill",
            "do_remote_prefill": role == "decode",
            **room,
        }
    }


def complete(url: str, request: dict[str, Any]) -> str:
    data = json.dumps(request).encode()
    asked = urllib.request.Request(f"{url}/v1/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=300) as response:
        return str(json.load(response)["choices"][0]["text"])


def served_model(url: str) -> str:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as response:
        return str(json.load(response)["data"][0]["id"])


def main() -> None:
    prefill_engine, prefill_url, port, decode_engine, decode_url, prompt = sys.argv[1:]
    host = urlsplit(prefill_url).hostname
    room = {"bootstrap_host": host, "bootstrap_port": int(port), "bootstrap_room": random.getrandbits(62) | 1}
    request = {"prompt": prompt, "temperature": 0}
    prefill = request | {
        "model": served_model(prefill_url),
        "max_tokens": 1,
        **body(prefill_engine, "prefill", room),
    }
    decode = request | {
        "model": served_model(decode_url),
        "max_tokens": 16,
        **body(decode_engine, "decode", room),
    }
    with ThreadPoolExecutor(2) as pool:  # at once: pages stream while prefill computes
        pool.submit(complete, prefill_url, prefill)
        print(pool.submit(complete, decode_url, decode).result())


if __name__ == "__main__":
    main()
