# SPDX-License-Identifier: Apache-2.0
"""Our options inside vLLM's ``KVTransferConfig``: checked where a user gives them, and a secret is never shown.

vLLM logs its arguments and its configuration. A secret among our options becomes a ``SecretStr`` before that: its
text is stars, and it travels to vLLM's other processes with its value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pydantic import SecretStr

from sage_kv_connector.config import SECRET_FIELDS, KVTransportConfig

BARE_WORD = "sage_kvt"
CONNECTOR_CLASS = "SageKVConnector"
NAMES = (BARE_WORD, CONNECTOR_CLASS)
MODULE_PATH = "kv_connector_module_path"
#: Where options stand in vLLM's configuration, for messages.
ORIGIN = "kv_connector_extra_config"
_NEARLY = re.compile(r"sage[-_]?kvt?[-_]?(transport|connector)?", re.IGNORECASE)


def take_options(config: Any) -> None:
    """Hide the secrets in a ``KVTransferConfig`` or a dict of its fields, and check the options.

    Raises ValueError naming field, value and what is allowed; also for a connector's name that is nearly ours.
    """
    for options in list(_ours(config)):
        for name in SECRET_FIELDS:
            if isinstance(options.get(name), str):
                options[name] = SecretStr(options[name])
        KVTransportConfig.load(options, ORIGIN)


def nearly_ours(name: str) -> bool:
    """Whether a connector's name is one of ours, or one with a slip of the hand."""
    return _NEARLY.fullmatch(name) is not None


def _ours(config: Any) -> Iterator[dict[str, Any]]:
    """Options of our connector, also where it is one of MultiConnector's."""
    name, extra = (
        config.get(field) if isinstance(config, dict) else getattr(config, field, None)
        for field in ("kv_connector", "kv_connector_extra_config")
    )
    module = config.get(MODULE_PATH) if isinstance(config, dict) else getattr(config, MODULE_PATH, None)
    if isinstance(name, str) and name not in NAMES and module is None and nearly_ours(name):
        # vLLM would not find it, and log its options, a secret too, before it says so.
        raise ValueError(f"kv_connector is {name!r}; allowed: {', '.join(NAMES)}")
    if not isinstance(extra, dict):
        return
    if name in NAMES:
        yield extra
    for child in extra.get("connectors", ()) if name == "MultiConnector" else ():
        if isinstance(child, dict):
            yield from _ours(child)
