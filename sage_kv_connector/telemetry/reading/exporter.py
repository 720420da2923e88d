# SPDX-License-Identifier: Apache-2.0
"""An HTTP server that shows what engines count: /metrics, /snapshot, /healthz, and the card.

Every request but /healthz must be allowed to read (readers.py).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from sage_kv_connector.telemetry.reading.card.router import card_router
from sage_kv_connector.telemetry.reading.prometheus import Engines
from sage_kv_connector.telemetry.reading.readers import refusal
from sage_kv_connector.telemetry.reading.sources import Source, body_of

OPEN_PATHS = ("/healthz",)
CARD = "/kv-transport"
Next = Callable[[Request], Awaitable[Response]]


def create_app(source: Source, token: str = "") -> FastAPI:
    """The app over the engines of a source."""
    registry = CollectorRegistry()
    registry.register(Engines(source))
    app = FastAPI(title="sage_kvt", docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def guard(request: Request, go_on: Next) -> Response:
        if request.url.path not in OPEN_PATHS and (refused := refusal(request, token)):
            return JSONResponse({"error": refused.error}, refused.status, headers=refused.headers)
        return await go_on(request)

    @app.get("/metrics")
    def metrics(request: Request) -> Response:
        encoder, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encoder(registry), media_type=None, headers={"Content-Type": content_type})

    @app.get("/snapshot")
    def snapshot() -> Response:
        return Response(body_of(source()), media_type="application/json")

    @app.get("/healthz")
    def healthz() -> Response:
        try:
            found = source()
        except (OSError, ValueError) as error:
            return JSONResponse({"ok": False, "error": str(error)}, 503)
        body = {"ok": not found.silent, "engines": len(found.snapshots), "silent": len(found.silent)}
        return JSONResponse(body, 503 if found.silent else 200)

    @app.get("/")
    def root() -> Response:
        return RedirectResponse(f"{CARD}/")

    app.include_router(card_router(source), prefix=CARD)
    return app
