# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt trace``: one request's way, step by step, from a file."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sage_kv_connector.cli.options import AsJson
from sage_kv_connector.console import progress, seconds_text
from sage_kv_connector.contract.failure import printable
from sage_kv_connector.telemetry.reading.request_way import Step, Way, way_of_file

#: Columns of the line of time.
WIDTH = 24


def trace(
    file: Annotated[
        Path,
        typer.Argument(
            help="what an exporter answers at /snapshot, or a collector's file of OTLP-JSON traces"
        ),
    ],
    transfer: Annotated[
        str, typer.Option(help="the transfer's id; left out: the newest that failed, else the newest")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Print one request's way: each step's time since the first, on prefill and on decode.

    Exit status 2 for a file that can't be read as either, and for a transfer that is not in it.
    """
    try:
        way = way_of_file(file, transfer)
    except OSError as error:
        progress.print(f"file {str(file)!r} can't be read: {error.strerror}", markup=False)
        raise typer.Exit(2) from None
    except ValueError as error:
        progress.print(printable(str(error)), markup=False)
        raise typer.Exit(2) from None
    if as_json:
        sys.stdout.write(msgspec.json.encode(way).decode() + "\n")
        return
    Console(highlight=False).print(_headline(way), _drawn(way), sep="\n")


def _headline(way: Way) -> Text:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(way.began))
    words = f"transfer {way.transfer or 'none'}, began {when}"
    if way.traces:
        words += f", trace {', '.join(way.traces)}"
    codes = dict.fromkeys(step.code for step in way.steps if step.code)
    if codes:
        words += f", failed: {', '.join(codes)} (sage-kvt explain CODE)"
    return Text(printable(words), "bold")


def _drawn(way: Way) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name, right in (("at", True), ("for", True), ("", False), ("step", False), ("", False)):
        table.add_column(
            name, justify="right" if right else "left", no_wrap=name in ("at", "for"), header_style="dim"
        )
    whole = max(step.at + step.seconds for step in way.steps)
    for step in way.steps:
        indent = "  " * step.depth
        table.add_row(
            seconds_text(step.at),
            seconds_text(step.seconds),
            _line_of_time(step, whole),
            Text(printable(f"{indent}{step.name}"), "red" if step.code else "", no_wrap=True),
            Text(printable(_about(step)), "red" if step.code else "dim"),
        )
        for moment in step.moments:
            words = Text(printable(f"{indent}  · {moment.name}"), no_wrap=True)
            table.add_row(seconds_text(moment.at), "", "", words, "")
    return table


def _about(step: Step) -> str:
    facts = [f"{name}={text}" for name, text in step.attributes.items() if name != "code"]
    failed = f"{step.code}: {step.detail}".rstrip(": ") if step.code else ""
    return "  ".join(word for word in (failed, step.of, *facts) if word)


def _line_of_time(step: Step, whole: float) -> Text:
    """Where it lies in the whole: at least one letter wide."""
    if whole <= 0:
        return Text("━", no_wrap=True)
    first = min(WIDTH - 1, int(step.at / whole * WIDTH))
    last = max(first + 1, min(WIDTH, round((step.at + step.seconds) / whole * WIDTH)))
    return Text(" " * first + "━" * (last - first), "red" if step.code else "green", no_wrap=True)
