# SPDX-License-Identifier: Apache-2.0
"""Every kind of request against a single server, in both orders of dispatch (integration_tests/request_kinds.py).

    make matrix ARGS="[--setup NAME] [--only TEXT] [--json]"

Starts real vLLM servers on a small model, one setup after the other: a prefill, a decode, one that computes everything
itself, and what the setup is about (integration_tests/request_setups.py). Setups with SGLang run in its own environment
(integration_tests/request_sglang_setups.py).
JSON: ``rows`` of name, engine, way, dispatch, right, seconds (the slowest request), stalls, refused, held, why;
``wrong``: rows that are not right; ``failed``: rows that stalled or left something behind; ``lost``: setups whose
servers did not start or ended, and why; ``not_run``: what can't run here, and why.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from integration_tests import request_kinds as kinds
from integration_tests.request_pair import Row
from integration_tests.request_setups import SETUPS, Workshop
from sage_kv_connector.launch.process import ServerError, unwind_on_sigterm
from scripts.in_sglang import said_in_sglang

#: Those of integration_tests/request_sglang_setups.py, which this environment may be unable to import.
IN_SGLANG = (
    "sglang", "sglang_lora", "sglang_images", "sglang_windows", "sglang_data_parallel", "sglang_stages", "cross",
)  # fmt: skip
NOT_RUN = {
    "second model runner": "vLLM 0.32's CPU build has it, but it needs Triton for CPUs, which is not published",
    "pipeline stages on vLLM": "vLLM 0.32 on CPU ends by itself with --pipeline-parallel-size 2",
    "attention in common of SGLang's ranks": "SGLang 0.5.23 on CPU ends by itself with --enable-dp-attention: "
    "'TorchNativeAttnBackend' object has no attribute 'get_cpu_graph_seq_len_fill_value'",
    "sleep and wake": "vLLM's CPU build has no sleep mode; tests/integrations/test_vllm_sleep.py runs the hooks",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--setup", action="append", choices=[*SETUPS, *IN_SGLANG], help="only this one; may be given again"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="kinds whose name contains this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    parser.add_argument("--logs", type=Path, help="an empty folder; the servers' logs and models stay there")
    given = parser.parse_args()
    random.seed(given.seed)
    rows: list[Row] = []
    lost: dict[str, str] = {}
    for name in given.setup or (*SETUPS, *IN_SGLANG):
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder) if given.logs is None else given.logs / name
            scratch.mkdir(parents=True, exist_ok=True)
            began = time.monotonic()
            try:
                if name in IN_SGLANG:
                    rows += _in_sglang(name, scratch, given)
                else:
                    rows += _run(name, scratch, given.only)
            except ServerError as error:
                lost[name] = str(error)
                print(f"{name}: LOST: {error}", file=sys.stderr, flush=True)
            print(f"{name} took {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    found = {
        "rows": [dataclasses.asdict(row) for row in rows],
        "wrong": sum(not row.right for row in rows),
        "failed": sum(bool(row.stalls or row.held) for row in rows),
        "lost": lost,
        "not_run": NOT_RUN,
    }
    if given.json:
        print(json.dumps(found))
    else:
        print(
            f"{len(rows)} rows, {found['wrong']} wrong, {found['failed']} that stalled or held something, "
            f"{len(lost)} setups lost"
        )
    return 1 if found["wrong"] or found["failed"] or lost else 0


def _in_sglang(setup: str, scratch: Path, given: argparse.Namespace) -> list[Row]:
    """Its rows, from a process in its environment if this one is another."""
    if find_spec("sglang") is None:
        found = said_in_sglang("scripts.request_matrix", given, "--setup", setup)
        if found["lost"]:
            raise ServerError(found["lost"][setup])
        return [Row(**row) for row in found["rows"]]
    from integration_tests import request_sglang_setups

    rows = []
    with request_sglang_setups.SETUPS[setup](scratch) as asked:
        for one in asked:
            if given.only in one.name:
                rows.append(one.row())
                print(_line(rows[-1]), file=sys.stderr, flush=True)
    return rows


def _run(setup: str, scratch: Path, only: str) -> list[Row]:
    rows = []
    with SETUPS[setup](Workshop(scratch)) as ways:
        for way in ways:
            for name in way.kinds:
                for dispatch in ("sequential", "concurrent") if only in name else ():
                    row = kinds.run(way.pair, name, dispatch, way.name, spread=way.spread)
                    rows.append(row)
                    print(_line(row), file=sys.stderr, flush=True)
    return rows


def _line(row: Row) -> str:
    state = "right" if row.right else f"WRONG ({row.why})"
    held = f", held {row.held}" if row.held else ""
    counted = f"{row.seconds} s, {row.stalls} stalls, {row.refused} refused{held}"
    return f"{row.engine}, {row.way}, {row.dispatch:10} {row.name}: {state}, {counted}"


if __name__ == "__main__":
    unwind_on_sigterm()
    sys.exit(main())
