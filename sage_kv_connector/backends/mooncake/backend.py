# SPDX-License-Identifier: Apache-2.0
"""Chunks are read by Mooncake's transfer engine, over the protocol that is asked for ($MC_… variables hold)."""

from __future__ import annotations

from typing import ClassVar

from sage_kv_connector.backends.base import Capabilities
from sage_kv_connector.backends.carried.backend import CarriedBackend
from sage_kv_connector.backends.carried.library import LibraryClass
from sage_kv_connector.backends.mooncake.library import MooncakeLibrary


class MooncakeBackend(CarriedBackend):
    """Addresses are ``mooncake://HOST:PORT``, as of tcp; the engine's own port is any free one."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        "mooncake", rank=28, crosses_nodes=True, pages=True, parts=True, protects=True, mode_changes=True
    )
    library_class: ClassVar[LibraryClass] = MooncakeLibrary
