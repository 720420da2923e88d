# SPDX-License-Identifier: Apache-2.0
"""Chunks are read by NIXL, over whatever its plugin finds: UCX's transports by default ($UCX_TLS and the like hold)."""

from __future__ import annotations

from typing import ClassVar

from sage_kv_connector.backends.base import Capabilities
from sage_kv_connector.backends.carried.backend import CarriedBackend
from sage_kv_connector.backends.carried.library import LibraryClass
from sage_kv_connector.backends.nixl.library import NixlLibrary


class NixlBackend(CarriedBackend):
    """Addresses are ``nixl://HOST:PORT``, as of tcp."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        "nixl", rank=27, crosses_nodes=True, pages=True, parts=True, protects=True, mode_changes=True
    )
    library_class: ClassVar[LibraryClass] = NixlLibrary
