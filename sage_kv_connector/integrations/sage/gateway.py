# SPDX-License-Identifier: Apache-2.0
"""The card "KV Transport" in SAGE's gateway.

isagellm-gateway has no entry points and no start-up hook of others, so who makes the app mounts the card. ``sage llm
serve`` does it by itself (``cli/sage_serve.py``); a gateway that is started otherwise is served as
``sage_kv_connector.integrations.sage.gateway:create_app``, or its own code calls ``mount_card``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sage_kv_connector.telemetry.reading.sources import Source, local
from sage_kv_connector.telemetry.reading.token import reading_token

PREFIX = "/kv-transport"


def mount_card(
    app: Any, source: Source = local, prefix: str = PREFIX, dependencies: Sequence[Any] | None = None
) -> None:
    """Serve the card at ``prefix``/ of a FastAPI app; once, however often it is called.

    ``source``: which engines it shows, those of this user on this machine if nothing else is said. ``dependencies``:
    FastAPI's, such as ``Depends(...)`` of a function that lets in or raises; none of them, ``()``: whoever reaches the
    app sees the card. Left out: whoever brings the exporter's token, or where none is set, this machine alone. Raises
    ValueError for a prefix that is no path and for a secret that can't be read.
    """
    from fastapi import Depends

    from sage_kv_connector.telemetry.reading.card.router import card_router
    from sage_kv_connector.telemetry.reading.readers import only_readers

    if not prefix.startswith("/") or prefix.endswith("/"):
        raise ValueError(f"prefix is {prefix!r}; it must begin with / and not end with it")
    if any(getattr(route, "path", "") == f"{prefix}/card.json" for route in app.routes):
        return
    guards = [Depends(only_readers(reading_token()))] if dependencies is None else list(dependencies)
    app.include_router(card_router(source), prefix=prefix, dependencies=guards)


def create_app() -> Any:
    """The gateway's app with the card, for ``uvicorn --factory``."""
    from sagellm_gateway import create_app as gateway_app

    app = gateway_app()
    mount_card(app)
    return app
