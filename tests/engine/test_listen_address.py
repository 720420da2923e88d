# SPDX-License-Identifier: Apache-2.0
"""Where an engine listens, and what it tells its peers."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys

import pytest

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.engine import EngineCore
from sage_kv_connector.engine.control import listen_address
from sage_kv_connector.engine.control.listen_address import advertised_host, link_addresses, listen_host

WITH_SECRET = KVTransportConfig.load({"secret": "s"})


def test_all_interfaces_only_with_a_secret() -> None:
    assert listen_host(KVTransportConfig(), b"") == "127.0.0.1"
    assert listen_host(WITH_SECRET, b"s") == "0.0.0.0"


def test_without_a_default_route_the_option_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoRoute:
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> NoRoute:
            return self

        def __exit__(self, *_: object) -> None: ...
        def connect(self, _: object) -> None:
            raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "socket", NoRoute)
    with pytest.raises(
        ValueError, match=r"advertise_host is not set.*no default route.*Network is unreachable"
    ):
        advertised_host(WITH_SECRET)
    assert advertised_host(WITH_SECRET.model_copy(update={"advertise_host": "10.0.0.7"})) == "10.0.0.7"


def test_the_same_in_a_network_namespace_without_one() -> None:
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rn", "true"], capture_output=True).returncode:
        pytest.skip("network namespaces can't be made here")
    code = (
        "from sage_kv_connector.config import KVTransportConfig\n"
        "from sage_kv_connector.engine import EngineCore\n"
        "EngineCore(KVTransportConfig(backend='tcp', secret='s')).start()\n"
    )
    done = subprocess.run(
        [unshare, "-rn", sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode != 0 and "ValueError: advertise_host is not set" in done.stderr


def test_links_are_interfaces_or_addresses_of_this_host() -> None:
    both = KVTransportConfig.load({"secret": "s", "links": "lo+127.0.0.2"})
    assert both.links == ("lo", "127.0.0.2")
    assert link_addresses(both) == ("127.0.0.1", "127.0.0.2")
    assert advertised_host(both) == "127.0.0.1"
    for wrong in ("192.0.2.7", "nosuch0", "2001:db8::7"):
        with pytest.raises(
            ValueError, match=rf"links has '{wrong}', which is no address of this host.*among .*lo"
        ):
            link_addresses(KVTransportConfig.load({"secret": "s", "links": wrong}))


def test_links_beyond_loopback_want_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen_address, "_own_address", str)
    assert link_addresses(KVTransportConfig.load({"links": "127.0.0.1+127.0.0.2"}))
    with pytest.raises(ValueError, match=r"links 10\.1\.0\.1 are reachable from other machines"):
        link_addresses(KVTransportConfig.load({"links": "127.0.0.1+10.1.0.1"}))


def test_a_peer_may_begin_over_any_link() -> None:
    config = KVTransportConfig.load({"secret": "s", "links": "127.0.0.1+127.0.0.2", "backend": "tcp"})
    core = EngineCore(config)
    core.start()
    try:
        hosts = [address.rpartition(":")[0] for address in core.addresses]
        assert hosts == ["tcp://127.0.0.1", "tcp://127.0.0.2"]
        assert len({address.rpartition(":")[2] for address in core.addresses}) == 1
    finally:
        core.close()
