# SPDX-License-Identifier: Apache-2.0
"""Which of a peer's addresses can work from here, and in what order."""

from __future__ import annotations

import logging

import pytest

from sage_kv_connector.backends import backend_names
from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.node import node_id
from sage_kv_connector.engine import order_addresses
from sage_kv_connector.engine.control import reachability
from sage_kv_connector.engine.control.reachability import enabled_backends

ADDRESSES = ("tcp://192.0.2.1:7000", "shm://abc", "other://x")


def test_on_one_node_the_preferred_backend_comes_first() -> None:
    assert order_addresses(ADDRESSES, node_id(), ("shm", "tcp")) == ("shm://abc", "tcp://192.0.2.1:7000")
    assert order_addresses(ADDRESSES, node_id(), ("tcp", "shm")) == ("tcp://192.0.2.1:7000", "shm://abc")


def test_from_another_node_only_what_crosses_nodes_is_left() -> None:
    for node in ("another", ""):
        assert order_addresses(ADDRESSES, node, ("shm", "tcp")) == ("tcp://192.0.2.1:7000",)


def test_what_is_not_enabled_here_is_left_out() -> None:
    assert order_addresses(ADDRESSES, node_id(), ("shm",)) == ("shm://abc",)
    assert order_addresses(ADDRESSES, node_id(), ()) == ()


@pytest.mark.parametrize(
    ("backend", "on_device", "zero_copy", "direct"),
    [
        ("auto", False, True, False),
        ("auto", True, True, True),
        ("auto", True, False, False),
        ("pcie", True, True, True),
        ("tcp", True, True, False),
    ],
)
def test_a_backend_of_device_memory_is_for_caches_on_devices(
    backend: str, on_device: bool, zero_copy: bool, direct: bool
) -> None:
    config = KVTransportConfig.load({"backend": backend, "zero_copy": zero_copy})
    enabled = enabled_backends(config, on_device=on_device)
    assert ("pcie" in enabled) == direct
    assert "tcp" in enabled, "another node, or a peer that can't be reached directly"
    assert ("shm" in enabled) == (backend != "tcp")
    assert len(set(enabled)) == len(enabled)


def test_auto_says_once_what_it_takes_and_why_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    reachability._say.cache_clear()
    with caplog.at_level(logging.INFO, logger=reachability.__name__):
        enabled = enabled_backends(KVTransportConfig.load({}))
        assert enabled_backends(KVTransportConfig.load({})) == enabled
    (said,) = [record.getMessage() for record in caplog.records]
    taken, _, left_out = said.partition(" that reaches a peer (")
    assert taken == f"backend auto takes the first of {', '.join(enabled)}"
    others = {
        one.partition(": ")[0]: one.partition(": ")[2] for one in left_out.removesuffix(")").split("; ")
    }
    assert set(others) == set(backend_names()) - set(enabled) and all(others.values())
    assert others["pcie"] == "no KV cache on a device"


def test_one_that_needs_a_device_says_so() -> None:
    with pytest.raises(ValueError, match="'pcie', which needs a KV cache on a device"):
        enabled_backends(KVTransportConfig.load({"backend": "pcie"}))
