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
from sage_kv_connector.engine.control.listen_address import advertised_host, listen_host

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
