# SPDX-License-Identifier: Apache-2.0
"""The page and its numbers as routes of a FastAPI app."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import msgspec
from fastapi import APIRouter, Header, Response

from sage_kv_connector.contract.failure import excerpt
from sage_kv_connector.telemetry.reading.card.contents import contents
from sage_kv_connector.telemetry.reading.card.page import page_files
from sage_kv_connector.telemetry.reading.sources import Source

#: Of every answer. Nothing inline and nothing from elsewhere; pages of the same origin may frame it.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'self'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
#: Engines are asked at most this often, however many pages are open. Seconds.
FRESH = 0.5


def card_router(source: Source) -> APIRouter:
    """``/`` is the page, ``/card.json`` its numbers.

    The numbers are ``{"error": …}`` with 503 while ``source`` raises, with 403 to a page of another site.

    ``source`` is called on a thread of the server's pool, by one request at a time.
    """
    router = APIRouter(include_in_schema=False)
    served = page_files()
    latest = _Latest(source, "charts.js" in served)

    @router.get("/card.json")
    def card_json(sec_fetch_site: str = Header("")) -> Response:
        if (
            sec_fetch_site == "cross-site"
        ):  # an app may let every site read what it answers: not these numbers
            status, body = 403, b'{"error": "asked by a page of another site"}'
        else:
            status, body = latest.answer()
        return Response(
            body, status, media_type="application/json", headers={**HEADERS, "Cache-Control": "no-store"}
        )

    for name, (content, media_type) in served.items():
        response = Response(content, media_type=media_type, headers={**HEADERS, "Cache-Control": "no-cache"})
        path = "/" if name == "index.html" else f"/{name}"
        router.add_api_route(path, _always(response), methods=["GET", "HEAD"])
    return router


def _always(response: Response) -> Callable[[], Response]:
    def file() -> Response:
        return response

    return file


class _Latest:
    """The last answer, as long as it is fresh."""

    def __init__(self, source: Source, charts: bool) -> None:
        self._source = source
        self._charts = charts
        self._lock = threading.Lock()
        self._asked = -FRESH
        self._answer = (503, b"{}")

    def answer(self) -> tuple[int, bytes]:
        with self._lock:
            if time.monotonic() - self._asked >= FRESH:
                try:
                    found = self._source()
                    shown = contents(found.snapshots, found.silent, charts=self._charts)
                    self._answer = (200, msgspec.json.encode(shown))
                except Exception as error:  # whatever a source does, the page says it
                    said = {"error": f"{type(error).__name__}: {excerpt(error)}"}
                    self._answer = (503, msgspec.json.encode(said))
                self._asked = time.monotonic()
            return self._answer
