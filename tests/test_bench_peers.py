# SPDX-License-Identifier: Apache-2.0
"""A peer that can't run costs its own row of a benchmark, and says what the machine lacks."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from sage_kv_connector.bench import transfer
from sage_kv_connector.bench.peer_libraries import missing_libraries, what_to_install
from sage_kv_connector.bench.transfer import Peer, bench_transfer, transfer_rows


@pytest.mark.parametrize(
    ("when", "why"),
    [
        ("start", "libsomething.so.1 can't be opened"),
        ("run", "no run today"),
        ("small", "no small today"),
        ("verify", "no verify today"),
    ],
)
def test_a_peer_that_fails_costs_its_own_row(monkeypatch: pytest.MonkeyPatch, when: str, why: str) -> None:
    well = Peer("tests.failing_peer", "never", "never")
    monkeypatch.setattr(transfer, "PEERS", {"nixl": Peer("tests.failing_peer", when, when), "mooncake": well})
    result = bench_transfer("tcp", 65536, 1 << 20, ("nixl", "mooncake", "limit"), 1)
    assert why in result["missing"]["nixl"] and set(result["peers"]) == {"mooncake"}
    assert result["gbytes_per_s"] > 0 and result["ratio_to_limit"] > 0 and result["verified"]
    assert ("nixl", f"left out: {result['missing']['nixl']}") in list(transfer_rows(result))


def test_what_a_wheel_lacks_is_named_with_its_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "peer_wheel"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "engine.so").touch()
    ldd = tmp_path / "ldd"
    ldd.write_text(
        "#!/bin/sh\necho '  libc.so.6 => /lib/libc.so.6 (0x1)'\necho '  libibverbs.so.1 => not found'\n"
        "echo '  libcudart.so.12 => not found'\necho '  liburing.so.2 => not found'\n"
    )
    ldd.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "peer_wheel" not in sys.modules
    missing = missing_libraries("peer_wheel")
    assert missing == ["libibverbs.so.1", "liburing.so.2"], "a machine without a device needs no driver"
    said = what_to_install(missing)
    assert said.endswith("apt-get install libibverbs1 liburing2") and "lacks libibverbs.so.1" in said
    assert what_to_install(missing_libraries("not_installed_here")) == ""
    assert "no package is known for libodd.so" in what_to_install(["libodd.so"])
