# SPDX-License-Identifier: Apache-2.0
"""An HTTP server that shows what engines count: /metrics, /snapshot, /healthz, and the card.

Without a token it answers on loopback only, and to requests that name a loopback host only, so that no web page can
read it through a browser. With one, every request but /healthz must bring it: as a Bearer, or as the password that a
browser asks for.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from sage_kv_connector.telemetry.reading.card.router import card_router
from sage_kv_connector.telemetry.reading.prometheus import Engines
from sage_kv_connector.telemetry.reading.sources import Source, body_of

OPEN_PATHS = ("/healthz",)
CARD = "/kv-transport"
CHALLENGE = 'Basic realm="sage_kvt exporter: the token is the password", Bearer'
Next = Callable[[Request], Awaitable[Response]]


def token_of_secret(secret: bytes) -> str:
    """The exporter's token where the transport's shared secret stands for one; the secret can't be found from it."""
    return hmac.new(secret, b"sage_kvt exporter token 1", hashlib.sha256).hexdigest()


def check_listens(host: str, token: str) -> None:
    """Raises ValueError for an address beyond loopback without a token."""
    if not token and not is_loopback(host):
        raise ValueError(
            f"host is {host!r}, which others reach; allowed without a token: 127.0.0.1, ::1, localhost. Set "
            "--token-file, $SAGE_KVT_EXPORTER_TOKEN or the transport's secret"
        )


def is_loopback(host: str) -> bool:
    """Of a host without a port, IPv6 with or without brackets."""
    name = host.strip("[]")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def create_app(source: Source, token: str = "") -> FastAPI:
    """The app over the engines of a source."""
    registry = CollectorRegistry()
    registry.register(Engines(source))
    app = FastAPI(title="sage_kvt", docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def guard(request: Request, go_on: Next) -> Response:
        if request.url.path not in OPEN_PATHS and (refused := _refusal(request, token)):
            return refused
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


def _refusal(request: Request, token: str) -> Response | None:
    if token:
        given = _given(request.headers.get("authorization", ""))
        if hmac.compare_digest(given.encode(), token.encode()):
            return None
        error = "this exporter wants its token: Authorization: Bearer TOKEN"
        return JSONResponse({"error": error}, 401, headers={"WWW-Authenticate": CHALLENGE})
    host = request.url.hostname or ""
    if is_loopback(host):
        return None
    return JSONResponse({"error": f"host {host!r} is not loopback, and there is no token"}, 421)


def _given(authorization: str) -> str:
    """The token of a Bearer, or the password of whatever user; "" for neither."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() != "basic":
        return authorization.removeprefix("Bearer ")
    try:
        return base64.b64decode(value, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""
