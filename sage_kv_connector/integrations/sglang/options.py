# SPDX-License-Identifier: Apache-2.0
"""Options of the transport in the environment of an SGLang server."""

from __future__ import annotations

import os

from sage_kv_connector.config import KVTransportConfig

#: ``key=value`` separated by commas.
CONFIG_ENV = "SAGE_KVT_CONFIG"


def options_from_environment() -> KVTransportConfig:
    """Raises ValueError naming the option that is not known or not allowed."""
    words = [word for word in os.environ.get(CONFIG_ENV, "").split(",") if word]
    return KVTransportConfig.from_words(words, f"${CONFIG_ENV}")
