# SPDX-License-Identifier: Apache-2.0
"""Options of the transport of an SGLang server: in its environment, or in HiCache's extra config."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from sage_kv_connector.config import KVTransportConfig

#: ``key=value`` separated by commas.
CONFIG_ENV = "SAGE_KVT_CONFIG"
EXTRA_CONFIG = "--hicache-storage-backend-extra-config"


def options_from_environment() -> KVTransportConfig:
    """Raises ValueError naming the option that is not known or not allowed."""
    words = [word for word in os.environ.get(CONFIG_ENV, "").split(",") if word]
    return KVTransportConfig.from_words(words, f"${CONFIG_ENV}")


def hicache_transport(transport: Mapping[str, Any] | None) -> KVTransportConfig:
    """What stands under ``transport`` in HiCache's extra config, else in the environment. Raises ValueError."""
    if transport is None:
        return options_from_environment()
    return KVTransportConfig.load(transport, f"transport in {EXTRA_CONFIG}")
