# SPDX-License-Identifier: Apache-2.0
"""How commands speak: progress and tables to people on stderr or stdout, one JSON object last on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

#: Progress and warnings; never mixed into a command's result.
progress = Console(stderr=True, highlight=False)


def emit(result: Mapping[str, Any], *, as_json: bool, title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print a result: with ``as_json`` the object on one line, else the rows as a table."""
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
        return
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    Console(highlight=False).print(table)


def bytes_text(count: float) -> str:
    """12345678 → '11.8 MiB'."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def seconds_text(seconds: float) -> str:
    """0.0123 → '12.3 ms'; from an hour on in hours."""
    for scale, unit, below in (
        (1e6, "µs", 1e-3),
        (1e3, "ms", 1.0),
        (1.0, "s", 600.0),
        (1 / 60, "min", 7200.0),
    ):
        if seconds < below:
            return f"{seconds * scale:.1f} {unit}"
    return f"{seconds / 3600:.1f} h"
