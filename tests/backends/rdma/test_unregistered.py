# SPDX-License-Identifier: Apache-2.0
"""Memory that a card does not take goes over sockets, and somebody is told."""

from __future__ import annotations

import logging

import pytest

from sage_kv_connector.backends.rdma.backend import RdmaBackend


class Endpoint:
    """Stands in for the data plane's, which wants a card: the second region is too much for it."""

    def __init__(self) -> None:
        self.regions = 0

    def register_memory(self, address: int, length: int) -> int:
        self.regions += 1
        return self.regions

    def unregistered(self) -> str:
        return (
            "" if self.regions < 2 else "rxe0 can't register 4096 bytes: Cannot allocate memory (ulimit -l)"
        )


def test_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    backend = RdmaBackend.__new__(RdmaBackend)
    backend._endpoint = Endpoint()  # type: ignore[assignment]
    backend._says_unregistered = True
    with caplog.at_level(logging.WARNING):
        backend.register_memory(4096, 4096)
        assert not caplog.records
        for _ in range(3):
            backend.register_memory(8192, 4096)
    (record,) = caplog.records
    assert record.message.startswith("rxe0 can't register 4096 bytes")
    assert record.message.endswith("what lies there goes over sockets")
