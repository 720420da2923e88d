# SPDX-License-Identifier: Apache-2.0
"""What the servers of one contender are started with. Each peer has a file of its own beside this one."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PLUGINS = Path(__file__).resolve().parent / "plugins"
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class ServerSide:
    """What one server of a pair is started with; without a config it hands nothing over."""

    kv_transfer_config: str | dict[str, Any] | None
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PeerPair:
    """A prefill and a decode server. ``bootstrap_port``: requests go to both as Mooncake's router sends them."""

    prefill: ServerSide
    decode: ServerSide
    bootstrap_port: int | None = None


@dataclass(frozen=True)
class Addresses:
    """Where prefill and decode are for each other, and the network device that is theirs; none: UCX's own choice."""

    prefill: str = LOOPBACK
    decode: str = LOOPBACK
    device: str | None = None


def version_of(*distributions: str) -> str:
    """Of the first that is installed, or why there is none."""
    for name in distributions:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return f"{' and '.join(distributions)} not installed"
