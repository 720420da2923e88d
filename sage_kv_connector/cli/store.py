# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt store``: keep KV of others in this process's memory."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from sage_kv_connector.cli.options import AsJson
from sage_kv_connector.console import bytes_text, progress


def store(
    capacity: Annotated[str, typer.Option(help="memory for KV, such as 8GiB")],
    host: Annotated[
        str, typer.Option(help="address to listen on; others than loopback need a secret")
    ] = "auto",
    port: Annotated[int, typer.Option(min=0, max=65535, help="tcp port; 0: any free one")] = 0,
    option: Annotated[
        list[str] | None, typer.Option(help="another option of the transport, key=value; may be repeated")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Keep KV of others in this process's memory, until SIGINT or SIGTERM.

    Prints one line with its addresses when it serves, and one with its counters when it ended.
    """
    from sage_kv_connector.store.serving import parse_capacity, run_store

    try:
        for line in run_store(parse_capacity(capacity), host, port, option or ()):
            _say(line, as_json=as_json)
    except (ValueError, OSError) as error:
        progress.print(f"store: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error


def _say(result: dict[str, Any], *, as_json: bool) -> None:
    """One line, as a person or a program reads it."""
    if as_json:
        text = json.dumps(result)
    elif "stats" in result:
        text = "ended: " + ", ".join(f"{name} {value}" for name, value in result["stats"].items())
    else:
        text = f"keeps up to {bytes_text(result['capacity'])} of KV at " + " and ".join(result["address"])
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
