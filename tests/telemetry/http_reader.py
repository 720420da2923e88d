# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from fastapi import FastAPI
from fastapi.testclient import TestClient

LOOPBACK = "http://127.0.0.1"


def reader(app: FastAPI, base_url: str = LOOPBACK, host: str = "127.0.0.1") -> TestClient:
    """Of an app; it asks from ``host``."""
    return TestClient(app, base_url, client=(host, 50000))
