# SPDX-License-Identifier: Apache-2.0
"""How a bench that can't be run ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from sage_kv_connector.console import progress


@contextmanager
def said_of(*errors: type[Exception]) -> Iterator[None]:
    """What one of these says is printed as it is, and the command ends with 1."""
    try:
        yield
    except errors as error:
        progress.print(f"bench: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
