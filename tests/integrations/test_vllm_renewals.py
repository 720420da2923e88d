# SPDX-License-Identifier: Apache-2.0
"""Requests that queue at decode keep their pages at prefill: one message for each of its ranks and interval."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

pytest.importorskip("vllm", reason="vLLM is not in this environment")

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.cache_view import KVCacheView
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.engine import EngineCore, TransferAudit
from sage_kv_connector.integrations.common.prefill_ranks import DecodeRank
from sage_kv_connector.integrations.vllm import prefill_directory
from sage_kv_connector.integrations.vllm.completions import Completions
from sage_kv_connector.integrations.vllm.decode import DecodeHalf
from sage_kv_connector.integrations.vllm.metadata import SageKVConnectorMetadata
from sage_kv_connector.integrations.vllm.prefill_directory import PrefillDirectory
from sage_kv_connector.integrations.vllm.remote_prefill import RemotePrefill, parse_remote

LEASE_S = 60.0


class _Core:
    """Notes what is renewed where."""

    def __init__(self) -> None:
        self.renewed: list[tuple[PeerAddress, tuple[str, ...]]] = []

    def renew(self, peer: PeerAddress, transfer_ids: tuple[str, ...]) -> None:
        self.renewed.append((peer, transfer_ids))


def remote(name: str, engine_id: str, ranks: int = 1) -> RemotePrefill:
    """As a client names it that asked prefill first."""
    addresses = {str(rank): [f"tcp://127.0.0.1:{4000 + rank}"] for rank in range(ranks)}
    return parse_remote({"remote_engine_id": engine_id, "transfer_id": name, "remote_ranks": addresses})


@pytest.fixture
def core() -> _Core:
    return _Core()


@pytest.fixture
def half(core: _Core) -> Iterator[DecodeHalf]:
    directory = PrefillDirectory(DecodeRank(0, 1, 8), ("tcp",), 1.0)
    config = KVTransportConfig(lease_s=LEASE_S)
    results, audit = cast(Completions, None), cast(TransferAudit, None)
    made = DecodeHalf(cast(EngineCore, core), KVCacheView(()), config, directory, results, audit)
    yield made
    made.close()


def step(half: DecodeHalf, **orders: Any) -> None:
    half.begin_step(SageKVConnectorMetadata(**orders))


def step_later(half: DecodeHalf, **orders: Any) -> None:
    """A third of the lease after the last renewal."""
    half._renewed_at -= LEASE_S / 3
    step(half, **orders)


def by_rank(core: _Core) -> list[tuple[str, int, tuple[str, ...]]]:
    taken, core.renewed = core.renewed, []
    return sorted((peer.engine_id, peer.rank, transfers) for peer, transfers in taken)


def test_one_message_for_each_rank_and_interval(half: DecodeHalf, core: _Core) -> None:
    step(half, expected=[remote("a", "first", 2), remote("b", "first", 2), remote("c", "second")])
    together = [("first", 0, ("a", "b")), ("first", 1, ("a", "b")), ("second", 0, ("c",))]
    assert by_rank(core) == together
    step(half)
    assert by_rank(core) == []  # the next third of the lease has not begun
    step_later(half)
    assert by_rank(core) == together
    step_later(half, no_longer_expected=["a", "c"])
    assert by_rank(core) == [("first", 0, ("b",)), ("first", 1, ("b",))]
    step_later(half, no_longer_expected=["b"])
    assert by_rank(core) == []


def test_a_bootstrap_server_is_asked_once_for_all_that_it_answers(
    half: DecodeHalf, core: _Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    answer = remote("any", "first").prefill

    def query(url: str, timeout_s: float) -> Any:
        asked.append(url)
        return answer

    monkeypatch.setattr(prefill_directory, "query_bootstrap", query)
    rooms = [RemotePrefill(name, None, "http://there", False, (f"{name}/more",)) for name in "ab"]
    step(half, expected=rooms)
    eventually(lambda: bool(core.renewed))
    assert by_rank(core) == [("first", 0, ("a", "a/more", "b", "b/more"))]
    assert asked == ["http://there"]


def eventually(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)
