# SPDX-License-Identifier: Apache-2.0
"""What clients get when something breaks, on pairs of real servers (docs/reliability.md).

    make faults ARGS="[--engine vllm|sglang] [--only TEXT] [--json] [--logs FOLDER]"

JSON: ``rows`` of case, engine, client (HTTP status, and what an error said), right, seconds, held (what was left when
all leases were over), note; totals ``wrong``, ``hung`` and ``leaked``. SGLang's rows run in its own environment.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from integration_tests.fault_servers import Row, run
from sage_kv_connector.launch.process import ServerError, unwind_on_sigterm
from scripts.in_sglang import said_in_sglang

ENGINES = ("vllm", "sglang")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--engine", action="append", choices=ENGINES, help="only this one")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    parser.add_argument("--logs", type=Path, help="a folder; the servers' logs and models stay there")
    given = parser.parse_args()
    random.seed(given.seed)
    rows: list[Row] = []
    for engine in given.engine or ENGINES:
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder) if given.logs is None else given.logs / engine
            scratch.mkdir(parents=True, exist_ok=True)
            for row in rows_of(engine, scratch, given):
                rows.append(row)
                print(line_of(row), file=sys.stderr, flush=True)
    totals = {
        "wrong": sum(not row.right for row in rows),
        "hung": sum("hung" in row.client for row in rows),
        "leaked": sum(bool(row.held) for row in rows),
    }
    if given.json:
        print(json.dumps({"rows": [dataclasses.asdict(row) for row in rows], **totals}))
    else:
        print(f"{len(rows)} rows, " + ", ".join(f"{count} {name}" for name, count in totals.items()))
    return 1 if any(totals.values()) else 0


def rows_of(engine: str, scratch: Path, given: argparse.Namespace) -> Iterator[Row]:
    if engine == "sglang" and find_spec("sglang") is None:
        said = said_in_sglang("scripts.fault_table", given, "--engine", "sglang")
        yield from (Row(**row) for row in said["rows"])
        return
    for name, (servers, faults) in setups(engine, scratch).items():
        chosen = {case: fault for case, fault in faults.items() if given.only in case}
        if not chosen:
            continue
        begun = time.monotonic()
        try:
            with servers as started:
                for case, fault in chosen.items():
                    yield run(case, engine, started, fault)
        except ServerError as error:
            print(f"{engine}, {name}: LOST: {error}", file=sys.stderr, flush=True)
            yield Row(f"servers: {name}", engine, f"lost: {error}"[:300], False, 0.0)
        print(f"{engine}, {name} took {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)


def setups(engine: str, scratch: Path) -> dict[str, tuple[AbstractContextManager[Any], dict[str, Any]]]:
    """Servers that are started once, and the cases that they are asked."""
    folders = [scratch / name for name in ("one", "two-ranks", "two-groups")]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    if engine == "sglang":
        from integration_tests import fault_rows_sglang as sglang
        from integration_tests.fault_sglang import sglang_servers

        return {
            "one rank": (sglang_servers(folders[0]), sglang.ON_ONE_RANK),
            "two ranks": (sglang_servers(folders[1], ranks=2), sglang.ON_TWO_RANKS),
        }
    from integration_tests import fault_rows as vllm
    from integration_tests.fault_vllm import vllm_servers
    from integration_tests.request_models import build_hybrid_model

    return {
        "one rank": (vllm_servers(folders[0]), vllm.ON_ONE_RANK),
        "two groups": (vllm_servers(folders[2], build_hybrid_model(folders[2])), vllm.ON_TWO_GROUPS),
        "two ranks": (vllm_servers(folders[1], ranks=2), vllm.ON_TWO_RANKS),
    }


def line_of(row: Row) -> str:
    state = "right" if row.right else "WRONG"
    held = f", held {row.held}" if row.held else ", nothing held"
    note = f" ({row.note})" if row.note else ""
    return f"{row.engine}, {row.case}: {state}, {row.client}, {row.seconds} s{held}{note}"


if __name__ == "__main__":
    unwind_on_sigterm()
    sys.exit(main())
