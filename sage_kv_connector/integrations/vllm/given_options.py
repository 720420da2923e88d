# SPDX-License-Identifier: Apache-2.0
"""Our options inside vLLM's ``KVTransferConfig``: checked where a user gives them, and a secret is never shown.

vLLM logs its arguments and its configuration. A secret among our options becomes a ``SecretStr`` before that: its
text is stars, and it travels to vLLM's other processes with its value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import SecretStr

from sage_kv_connector.config import KVTransportConfig

BARE_WORD = "sage_kvt"
CONNECTOR_CLASS = "SageKVConnector"
#: Where options stand in vLLM's configuration, for messages.
ORIGIN = "kv_connector_extra_config"


def take_options(config: Any) -> None:
    """Hide the secret in a ``KVTransferConfig`` or a dict of its fields, and check the options.

    Raises ValueError naming field, value and what is allowed.
    """
    for options in list(_ours(config)):
        if isinstance(options.get("secret"), str):
            options["secret"] = SecretStr(options["secret"])
        KVTransportConfig.load(options, ORIGIN)


def _ours(config: Any) -> Iterator[dict[str, Any]]:
    """Options of our connector, also where it is one of MultiConnector's."""
    name, extra = (
        config.get(field) if isinstance(config, dict) else getattr(config, field, None)
        for field in ("kv_connector", "kv_connector_extra_config")
    )
    if not isinstance(extra, dict):
        return
    if name in (BARE_WORD, CONNECTOR_CLASS):
        yield extra
    for child in extra.get("connectors", ()) if name == "MultiConnector" else ():
        if isinstance(child, dict):
            yield from _ours(child)
