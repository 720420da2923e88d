# SPDX-License-Identifier: Apache-2.0
"""A client that asks a server and hangs up before it has its answer."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sage_kv_connector.launch.process import Process


@contextmanager
def leaving(
    server: Process, path: str, body: Mapping[str, Any], timeout_s: float = 60
) -> Iterator[http.client.HTTPConnection]:
    """It asks, and hangs up when this ends."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout_s)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        yield connection
    finally:
        connection.close()
