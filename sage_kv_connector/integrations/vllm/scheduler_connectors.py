# SPDX-License-Identifier: Apache-2.0
"""Connectors of ours in a vLLM engine, which is told things that vLLM has no hook for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def connectors_with(hook: str, scheduler: Any) -> Iterator[Any]:
    """Of a scheduler's connector and those that it holds (MultiConnector): those that have this method."""
    return (one for one in _connectors(getattr(scheduler, "connector", None)) if hasattr(one, hook))


def _connectors(connector: Any) -> Iterator[Any]:
    if connector is not None:
        yield connector
        for inner in getattr(connector, "_connectors", ()):
            yield from _connectors(inner)
