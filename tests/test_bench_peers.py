# SPDX-License-Identifier: Apache-2.0
"""A peer that can't run costs its own row of a benchmark, and says what the machine lacks."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from sage_kv_connector import doctor
from sage_kv_connector.bench import contender, handover, transfer
from sage_kv_connector.bench.peer_libraries import missing_libraries, what_to_install
from sage_kv_connector.bench.server_pairs import ServerPair
from sage_kv_connector.bench.transfer import Peer, bench_transfer, transfer_rows
from sage_kv_connector.launch.process import Process, ServerError


@pytest.mark.parametrize(
    ("when", "why"),
    [
        ("start", "libsomething.so.1 can't be opened"),
        ("run", "no run today"),
        ("small", "no small today"),
        ("verify", "no verify today"),
        ("nonsense", "tests.failing_peer answered '[info] a line for people' to 'run', which is no object"),
        ("hang", "tests.failing_peer did not answer 'run' within 4 s"),
    ],
)
def test_a_peer_that_fails_costs_its_own_row(monkeypatch: pytest.MonkeyPatch, when: str, why: str) -> None:
    monkeypatch.setattr(contender, "ANSWER_S", 4.0 if when == "hang" else 60.0)
    well = Peer("tests.failing_peer", "never", "never")
    monkeypatch.setattr(transfer, "PEERS", {"nixl": Peer("tests.failing_peer", when, when), "mooncake": well})
    result = bench_transfer("tcp", 65536, 1 << 20, ("nixl", "mooncake", "limit"), 1)
    assert why in result["missing"]["nixl"] and set(result["peers"]) == {"mooncake"}
    assert result["gbytes_per_s"] > 0 and result["ratio_to_limit"] > 0 and result["verified"]
    assert ("nixl", f"left out: {result['missing']['nixl']}") in list(transfer_rows(result))


def test_a_loud_peer_is_not_stopped_by_what_it_says() -> None:
    one = contender.Contender("tests.failing_peer", ("loud", "1", "1"))
    assert one.ask("verify") == {"verified": True}
    one.close()


def test_nothing_of_a_contender_is_left() -> None:
    one = contender.Contender("tests.failing_peer", ("never", "1", "1"))
    group = one._process.pid
    one.close()
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)


class Pair(ServerPair):
    """Servers that answer at once, or fail as they are told."""

    def __init__(self, name: str, error: Exception | None = None) -> None:
        server = Process(name, ["true"], 1, Path(os.devnull))
        super().__init__(name, server, server, None)
        self._error = error

    def sequential(self, prompt: list[int], max_tokens: int = 2) -> dict[str, Any]:
        if self._error is not None:
            raise self._error
        return {"ttft_s": 0.1, "prefill_s": 0.2, "token_ids": [1]}

    def alone(self, prompt: list[int]) -> list[int]:
        return [1]


@pytest.mark.parametrize(
    "error",
    [
        ServerError("answered 500"),
        ConnectionRefusedError("connection refused"),
        KeyError("0"),
        ValueError("no JSON"),
    ],
)
def test_a_peers_servers_that_fail_a_request_cost_their_row(error: Exception) -> None:
    pairs = [Pair("nixl", error), Pair("mooncake")]
    rounds = [handover._round(pairs, 8, "a round") for _ in range(2)]
    assert [set(one) for one in rounds] == [{"mooncake"}] * 2
    assert pairs[0].failed == f"failed a request: {error}" and not pairs[1].failed


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


def test_doctor_does_not_guess_where_it_cant_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mooncake").mkdir()
    (tmp_path / "mooncake" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    found = doctor._mooncake()
    assert found.state == "missing" and "no ldd here" in found.detail
