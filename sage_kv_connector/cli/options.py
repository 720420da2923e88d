# SPDX-License-Identifier: Apache-2.0
"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout, all else on stderr")]


def _host_backend(value: str) -> str:
    """One of the backends that move host memory. They are looked up only now: ``doctor`` must run without them."""
    from sage_kv_connector.backends import host_backends

    if value not in host_backends():
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(host_backends())}")
    return value


BackendChoice = Annotated[
    str,
    typer.Option(
        "--backend",
        callback=_host_backend,
        metavar="NAME",
        help="how KV travels: shm, tcp, or another that is here",
    ),
]
