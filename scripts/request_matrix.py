# SPDX-License-Identifier: Apache-2.0
"""Every kind of request against a single server, in both orders of dispatch (integration_tests/request_kinds.py).

    python -m scripts.request_matrix [--only TEXT] [--json]

Starts real vLLM servers on a small model: a prefill, a decode, one that computes everything itself, and a prefill with
other weights. JSON:
``rows`` of name, engine, dispatch, right, seconds (the slowest request), stalls, refused, held, why; ``wrong``: rows
that are not right; ``failed``: rows that stalled or left something behind; ``not_run``: what can't run here, and why.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import secrets
import sys
import tempfile
from pathlib import Path

from integration_tests import request_kinds as kinds
from integration_tests.cluster import bare_word
from sage_kv_connector.config import SECRET_ENV
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.launch.process import core_halves, running
from sage_kv_connector.launch.tiny_model import build
from sage_kv_connector.launch.vllm import VllmOptions, vllm_server

NOT_RUN = {
    "second model runner": "vLLM 0.32's CPU build has it, but it needs Triton for CPUs, which is not published",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="kinds whose name contains this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    given = parser.parse_args()
    random.seed(given.seed)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        scratch, port, strange_port = Path(folder), free_port(), free_port()
        model = build(scratch, "small")
        options = VllmOptions(
            model,
            scratch,
            4096,
            extra=("--dtype", "float32", "--chat-template", kinds.CHAT_TEMPLATE),
            env={SECRET_ENV: secrets.token_urlsafe(16)},
        )
        words = bare_word()
        first, second = core_halves()
        prefill = vllm_server("prefill", options, f"{words},bootstrap_port={port}", first)
        decode = vllm_server("decode", options, words, second)
        alone = vllm_server("alone", options, None, second)
        others = dataclasses.replace(options, model=build(scratch, "small", seed=1))
        stranger = vllm_server("stranger", others, f"{words},bootstrap_port={strange_port}", first)
        with running(prefill, decode, alone, stranger):
            pair = kinds.Pair(
                prefill,
                decode,
                alone,
                f"http://127.0.0.1:{port}",
                (stranger, f"http://127.0.0.1:{strange_port}"),
            )
            for name in kinds.KINDS:
                if given.only not in name:
                    continue
                for dispatch in ("sequential", "concurrent"):
                    row = kinds.run(pair, name, dispatch)  # type: ignore[arg-type]
                    rows.append(row)
                    print(_line(row), file=sys.stderr, flush=True)
    found = {
        "rows": [dataclasses.asdict(row) for row in rows],
        "wrong": sum(not row.right for row in rows),
        "failed": sum(bool(row.stalls or row.held) for row in rows),
        "not_run": NOT_RUN,
    }
    if given.json:
        print(json.dumps(found))
    else:
        print(f"{len(rows)} rows, {found['wrong']} wrong, {found['failed']} that stalled or held something")
    return 1 if found["wrong"] or found["failed"] else 0


def _line(row: kinds.Row) -> str:
    state = "right" if row.right else f"WRONG ({row.why})"
    held = f", held {row.held}" if row.held else ""
    counted = f"{row.seconds} s, {row.stalls} stalls, {row.refused} refused{held}"
    return f"{row.engine} {row.dispatch:10} {row.name}: {state}, {counted}"


if __name__ == "__main__":
    sys.exit(main())
