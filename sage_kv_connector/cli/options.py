# SPDX-License-Identifier: Apache-2.0
"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Sequence
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

SecurityLevels = Annotated[
    str, typer.Option("--security", help="ours also with any of authenticated,encrypted, beside none")
]


def words(given: str, option: str, allowed: Sequence[str]) -> list[str]:
    """The words that an option lists, separated by commas."""
    if not given or not set(given.split(",")) <= set(allowed):
        raise typer.BadParameter(f"{option} {given!r}: allowed are {', '.join(allowed)}")
    return given.split(",")


def lengths(text: str, option: str = "--tokens") -> list[int]:
    """Numbers of an option, such as prompt lengths."""
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise typer.BadParameter(f"{option} {text!r} must be numbers from 1 on, separated by commas")
    return found


def security_levels(given: str, backend: str) -> list[str]:
    """Levels of ``--security`` beside none, for a backend that has them."""
    from sage_kv_connector.backends import backend_class

    levels = [
        level
        for level in words(given, "--security", ("none", "authenticated", "encrypted"))
        if level != "none"
    ]
    if levels and not backend_class(backend).capabilities.protects:
        raise typer.BadParameter(f"--security {given!r}: {backend} does not leave the node; allowed is none")
    return levels
