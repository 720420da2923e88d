# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt top``: what the engines of this machine, or those behind an exporter, do right now."""

from __future__ import annotations

import os
import sys
import time
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.live import Live

from sage_kv_connector.cli.exporter import TokenFile
from sage_kv_connector.cli.options import AsJson
from sage_kv_connector.cli.top_screen import TopScreen
from sage_kv_connector.console import progress
from sage_kv_connector.telemetry.reading import sources
from sage_kv_connector.telemetry.reading.overview import Overview
from sage_kv_connector.telemetry.reading.overviews import Overviews
from sage_kv_connector.telemetry.reading.token import reading_token
from sage_kv_connector.telemetry.recording.publishing import DIRECTORY_ENV, directory


def top(
    url: Annotated[
        str, typer.Argument(help="http://HOST:PORT of an exporter; left out: the engines of this user here")
    ] = "",
    interval: Annotated[float, typer.Option(min=0.1, max=3600, help="seconds between two readings")] = 1.0,
    once: Annotated[bool, typer.Option(help="print one frame, of two readings, and end")] = False,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Show links, rates, failures, latencies and the last transfers, live. Ctrl-C ends it.

    Where stdout is no terminal, as in a pipe, and with --json, one frame is printed as with --once. Exit status 1
    where no engine was found, 2 where nothing could be read.
    """
    try:
        source = sources.exporter(url, reading_token(token_file)) if url else sources.local
    except ValueError as error:
        progress.print(str(error), markup=False)
        raise typer.Exit(2) from None
    console = Console(highlight=False)
    overviews = Overviews()
    if once or as_json or not console.is_terminal:
        try:
            overviews.next(source())
            time.sleep(interval)
            shown = overviews.next(source())
        except (OSError, ValueError) as error:
            progress.print(f"{error}", markup=False)
            raise typer.Exit(2) from None
        _print(shown, url, console, as_json)
        raise typer.Exit(0 if shown.engines else 1)
    shown, trouble = overviews.next(sources.Found([])), ""
    with Live(console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                try:
                    shown, trouble = overviews.next(source()), ""
                except (OSError, ValueError) as error:
                    trouble = f"not read: {error}"
                live.update(TopScreen(shown, trouble or url, no_engines(url)), refresh=True)
                time.sleep(interval)
        except KeyboardInterrupt:
            pass


def no_engines(url: str) -> str:
    """What to do where no engine answers."""
    if url:
        return (
            f"The exporter at {url} knows no engine. It shows servers of its own user on its own machine: see there, "
            "with sage-kvt top."
        )
    return (
        f"No engine of user {os.getuid()} answers in {directory()}. Is a server with this transport running, as this "
        "user, on this machine, in this container? An engine publishes once its KV cache is there, and not with "
        f"telemetry=false. If ${DIRECTORY_ENV} or $XDG_RUNTIME_DIR is set for the server, set the same here."
    )


def _print(shown: Overview, url: str, console: Console, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(msgspec.json.encode(shown).decode() + "\n")
        sys.stdout.flush()
        if not shown.engines:
            progress.print(no_engines(url), markup=False)
        return
    console.print(TopScreen(shown, url, no_engines(url)))
