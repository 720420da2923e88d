# SPDX-License-Identifier: Apache-2.0
"""Connections while one thread polls and another connects."""

from __future__ import annotations

import time

import pytest

from sage_kv_connector.backends.shm.backend import ShmBackend
from tests.backends.pair import Pair
from tests.backends.pcie.kinds import KINDS


def test_a_connection_opens_also_when_it_is_polled_before_connect_returned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quick = ShmBackend.connect

    def slow(backend: ShmBackend, address: str, timeout_s: float) -> int:
        connection = quick(backend, address, timeout_s)
        time.sleep(0.2)
        return connection

    monkeypatch.setattr(ShmBackend, "connect", slow)
    Pair(KINDS[0]).close()
