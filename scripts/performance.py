# SPDX-License-Identifier: Apache-2.0
"""Measure the figures of docs/performance.md, a file of JSON a section; ``make report`` then writes them into the page.

    make performance ARGS="[NAME ...]"     sections of sage_kv_connector/bench/performance/sections.py; default: all

``link`` wants root. Nothing else should run meanwhile: all takes three quarters of an hour.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from sage_kv_connector.bench.performance.page import kept
from sage_kv_connector.bench.performance.sections import BENCH, SECTIONS
from sage_kv_connector.bench.provenance import provenance
from sage_kv_connector.console import progress, seconds_text
from sage_kv_connector.launch.process import unwind_on_sigterm

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"


def main() -> int:
    parser = argparse.ArgumentParser(prog="performance", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"any of {', '.join(SECTIONS)}; default: all"
    )
    names = parser.parse_args().names or list(SECTIONS)
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"NAME is {unknown[0]!r}, allowed: {', '.join(SECTIONS)}")
    failed = []
    for number, name in enumerate(names, 1):
        begun = time.monotonic()
        progress.print(f"{name}, {number} of {len(names)}")
        try:
            runs = [{"command": one, "result": result(one)} for one in SECTIONS[name].commands]
        except (subprocess.CalledProcessError, ValueError) as error:
            progress.print(f"{name} failed, its file stays as it was: {error}")
            failed.append(name)
            continue
        kept(RESULTS, name).write_text(json.dumps({"runs": runs, **provenance()}, indent=1) + "\n")
        progress.print(f"{name} took {seconds_text(time.monotonic() - begun)}")
    return 1 if failed else 0


def result(command: str) -> object:
    """The JSON that one of a section's commands prints last. Raises CalledProcessError, ValueError."""
    words = shlex.split(command)
    program = ["sage-kvt"] if command.startswith(BENCH) else [sys.executable, "-m"]
    done = subprocess.run([*program, *words, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    unwind_on_sigterm()
    sys.exit(main())
