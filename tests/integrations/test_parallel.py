# SPDX-License-Identifier: Apache-2.0
"""Engines that are several: data parallel ranks with fixed ports, pipeline stages on both sides, context parallel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from types import SimpleNamespace

import pytest

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.integrations.common.bootstrap_answers import (
    query_bootstrap,
    query_engine,
    query_engines,
)
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.integrations.common.prefill_ranks import (
    DecodeRank,
    PrefillEngine,
    ranks_of,
    read_peers,
)
from sage_kv_connector.integrations.vllm.bootstrap import BootstrapServer
from sage_kv_connector.integrations.vllm.parallel import own_ports, refuse_context_parallel


def engine(engine_id: str) -> PrefillEngine:
    return PrefillEngine(ranks_of(engine_id, {0: ("tcp://127.0.0.1:1",)}, "node"))


def parallel(dp_rank: int, tp_size: int = 1, pp_size: int = 1) -> SimpleNamespace:
    # What vLLM leaves of it for a dense model: the engine believes to be alone, but for its index.
    return SimpleNamespace(
        data_parallel_size=1,
        data_parallel_index=dp_rank,
        tensor_parallel_size=tp_size,
        pipeline_parallel_size=pp_size,
    )


def test_fixed_ports_of_data_parallel_ranks_do_not_meet() -> None:
    config = KVTransportConfig(port=7000, advertise_port=9000, bootstrap_port=8998)
    taken: list[int] = []
    for dp_rank in range(3):
        own = own_ports(config, parallel(dp_rank, tp_size=2, pp_size=2))
        taken += [own.port + rank for rank in range(4)]
        assert own.advertise_port == own.port + 2000 and own.bootstrap_port == 8998 + dp_rank
    assert taken == list(range(7000, 7012))


def test_free_ports_stay_free_and_a_port_beyond_the_last_is_named() -> None:
    assert own_ports(KVTransportConfig(), parallel(3)).port == 0
    assert own_ports(KVTransportConfig(bootstrap_port=0), parallel(3)).bootstrap_port == 0
    with pytest.raises(ValueError, match="port is 65535; with data parallel rank 1 that comes to 65536"):
        own_ports(KVTransportConfig(port=65535), parallel(1))


@pytest.mark.parametrize("name", ["prefill_context_parallel_size", "decode_context_parallel_size"])
def test_context_parallel_is_refused_by_name(name: str) -> None:
    refuse_context_parallel(SimpleNamespace(**{name: 1}))
    with pytest.raises(ValueError, match=f"{name} is 2; allowed: 1"):
        refuse_context_parallel(SimpleNamespace(**{name: 2}))


@pytest.fixture
def bootstrap() -> Iterator[int]:
    """Port of rank 0's bootstrap server; rank 1's is on the next one, and a stranger's on the one behind it."""
    with ExitStack() as servers:
        for _ in range(20):
            port = free_port()
            try:
                made = [
                    BootstrapServer("127.0.0.1", port + number, engine(name), dp_rank)
                    for number, (name, dp_rank) in enumerate([("e_dp0", 0), ("e_dp1", 1), ("other_dp2", 2)])
                ]
            except OSError:
                continue
            for server in made:
                servers.enter_context(closing(server))
            yield port
            return
    pytest.fail("no three free ports in a row")


def test_one_bootstrap_server_answers_for_all_ranks_of_the_node(bootstrap: int) -> None:
    url = f"http://127.0.0.1:{bootstrap}"
    assert query_engines(url, 5.0) == {0: engine("e_dp0"), 1: engine("e_dp1")}, (
        "a stranger's is not among them"
    )
    assert query_engine(url, 5.0, "e_dp1") == engine("e_dp1") == query_bootstrap(url, 5.0, 1)
    assert query_engines(f"http://127.0.0.1:{bootstrap + 1}", 5.0) == {1: engine("e_dp1")}


def test_after_a_restart_the_same_rank_is_asked(bootstrap: int) -> None:
    url = f"http://127.0.0.1:{bootstrap}"
    assert query_engine(url, 5.0, "before_dp1") == engine("e_dp1")
    with pytest.raises(ValueError, match="engine_id 'before_dp7' is not among e_dp0, e_dp1"):
        query_engine(url, 5.0, "before_dp7")
    with closing(BootstrapServer("127.0.0.1", 0, engine("now"))) as alone:
        assert query_engine(f"http://127.0.0.1:{alone.port}", 5.0, "before") == engine("now")


def test_stages_read_the_stage_of_their_number() -> None:
    ranks = {rank: (f"tcp://127.0.0.1:{rank + 1}",) for rank in range(4)}
    prefill = PrefillEngine(ranks_of("e", ranks, ""), pp_size=2)
    read = {
        (stage, tp_rank): [(one.peer.rank, one.consumers) for one in read_peers(who, prefill, ("tcp",))]
        for stage in (0, 1)
        for tp_rank in (0, 1)
        for who in [DecodeRank(tp_rank, 2, 4, stage, 2)]
    }
    assert read == {(0, 0): [(0, 1)], (0, 1): [(1, 1)], (1, 0): [(2, 1)], (1, 1): [(3, 1)]}
    one_rank = [
        [
            (one.peer.rank, one.consumers)
            for one in read_peers(DecodeRank(0, 1, 1, stage, 2), prefill, ("tcp",))
        ]
        for stage in (0, 1)
    ]
    assert one_rank == [[(0, 1), (1, 0)], [(2, 1), (3, 0)]], (
        "replicas that nobody reads are told by their own stage"
    )
    with pytest.raises(ValueError, match="pp_size: 3 here, 2 at prefill; here it must be 1 or as many"):
        read_peers(DecodeRank(0, 1, 4, 0, 3), prefill, ("tcp",))
