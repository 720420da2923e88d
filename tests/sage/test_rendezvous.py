# SPDX-License-Identifier: Apache-2.0
"""How ranks come together, and who is not let in."""

from __future__ import annotations

import socket
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from sage_kv_connector.contract.chunk import DeviceSpec
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.integrations.sage.rendezvous import RendezvousError, meet

Table = dict[int, DeviceSpec]


def spec(rank: int) -> DeviceSpec:
    return DeviceSpec(addresses=(f"tcp://127.0.0.1:{9000 + rank}",), engine_id=f"engine-{rank}")


def start(
    pool: ThreadPoolExecutor,
    rank: int,
    port: int,
    *,
    world_size: int = 3,
    secret: bytes = b"secret",
    timeout_s: float = 10.0,
) -> Future[Table]:
    return pool.submit(meet, rank, world_size, "127.0.0.1", port, spec(rank), secret, timeout_s)


def test_all_learn_of_all_in_whatever_order_and_strangers_change_nothing() -> None:
    port = free_port()
    with ThreadPoolExecutor(5) as pool:
        late = [start(pool, rank, port) for rank in (2, 1)]
        host = start(pool, 0, port)
        intruder = start(pool, 1, port, secret=b"other", timeout_s=1.0)
        with pytest.raises(RendezvousError, match="rank 0 did not answer"):
            intruder.result(10)
        tables = [host.result(10), *(one.result(10) for one in late)]
    assert tables == [{rank: spec(rank) for rank in range(3)}] * 3


def test_noise_on_the_port_is_survived() -> None:
    port = free_port()
    with ThreadPoolExecutor(3) as pool:
        host = start(pool, 0, port, world_size=2)
        for noise in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 4, b"\x02\x00\x00\x00{}"):
            for _ in range(100):
                try:
                    with socket.create_connection(("127.0.0.1", port), timeout=2) as stranger:
                        stranger.sendall(noise)
                    break
                except ConnectionRefusedError:
                    continue
        guest = start(pool, 1, port, world_size=2)
        assert host.result(15) == guest.result(15)


def test_missing_ranks_and_other_worlds_are_named() -> None:
    port = free_port()
    with ThreadPoolExecutor(3) as pool:
        host = start(pool, 0, port, timeout_s=2.0)
        other = start(pool, 1, port, world_size=4, timeout_s=2.0)
        with pytest.raises(RendezvousError, match="world_size is 4 at rank 1, 3 at rank 0"):
            other.result(10)
        with pytest.raises(RendezvousError, match="these ranks did not come: 1, 2"):
            host.result(10)


def test_wrong_calls() -> None:
    with pytest.raises(ValueError, match="rank is 2; allowed with world_size 2: 0 to 1"):
        meet(2, 2, "127.0.0.1", 1, spec(2), b"", 1.0)
    with pytest.raises(ValueError, match=r"master_addr '10.0.0.5' is reachable from other machines"):
        meet(0, 2, "10.0.0.5", 1, spec(0), b"", 1.0)
    assert meet(0, 1, "127.0.0.1", 1, spec(0), b"", 1.0) == {0: spec(0)}
