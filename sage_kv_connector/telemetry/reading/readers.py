# SPDX-License-Identifier: Apache-2.0
"""Who may read what engines count over HTTP: whoever brings the token, or, where none is set, this machine alone.

Without a token a request must come from loopback and name a loopback host, so that no web page can read through a
browser. With one, every request must bring it: as a Bearer, or as the password that a browser asks for.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Callable
from typing import NamedTuple

from fastapi import HTTPException, Request

from sage_kv_connector.contract.peer import is_loopback
from sage_kv_connector.telemetry.reading.token import TOKEN_ENV

CHALLENGE = 'Basic realm="sage_kvt: the token is the password", Bearer'


class Refusal(NamedTuple):
    """``status``: of HTTP."""

    status: int
    error: str
    headers: dict[str, str]


def check_listens(host: str, token: str) -> None:
    """Raises ValueError for an address beyond loopback without a token."""
    if not token and not is_loopback(host):
        raise ValueError(
            f"host is {host!r}, which others reach; allowed without a token: 127.0.0.1, ::1, localhost. Set "
            f"--token-file, ${TOKEN_ENV} or the transport's secret"
        )


def refusal(request: Request, token: str) -> Refusal | None:
    """Why a request may not read; None if it may."""
    if token:
        given = _given(request.headers.get("authorization", ""))
        if hmac.compare_digest(given.encode(), token.encode()):
            return None
        return Refusal(
            401, "it wants its token: Authorization: Bearer TOKEN", {"WWW-Authenticate": CHALLENGE}
        )
    client, host = request.client.host if request.client else "", request.url.hostname or ""
    if not is_loopback(client):
        error = f"client {client!r} is not loopback, and there is no token: set ${TOKEN_ENV} or the secret"
        return Refusal(403, error, {})
    if not is_loopback(host):
        return Refusal(421, f"host {host!r} is not loopback, and there is no token", {})
    return None


def only_readers(token: str) -> Callable[[Request], None]:
    """A dependency of FastAPI's routes: whoever may not read gets the refusal."""

    def check(request: Request) -> None:
        if refused := refusal(request, token):
            raise HTTPException(refused.status, refused.error, refused.headers)

    return check


def _given(authorization: str) -> str:
    """The token of a Bearer, or the password of whatever user; "" for neither."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() != "basic":
        return authorization.removeprefix("Bearer ")
    try:
        return base64.b64decode(value, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""
