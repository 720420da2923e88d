# SPDX-License-Identifier: Apache-2.0
"""``doctor --pair`` on real vLLM servers: a pair that hands over, and pairs that quietly would not."""

from __future__ import annotations

from pathlib import Path

import pytest

from integration_tests.cluster import Cluster
from sage_kv_connector.config import SECRET_ENV
from sage_kv_connector.doctor.pair import examine_pair
from sage_kv_connector.launch.process import running
from sage_kv_connector.launch.vllm import VllmOptions, vllm_server


def test_a_pair_that_works(cluster: Cluster) -> None:
    found = examine_pair(cluster.prefill.url, cluster.decode_shm.url)[-1]
    assert found.state == "ok" and "bytes of KV arrived" in found.detail, found


@pytest.mark.full
def test_pairs_that_hand_nothing_over(scratch: Path, model: Path) -> None:
    """Another secret, other weights' names, an address that nobody reaches, no connector, the wrong way round."""
    given = {
        "prefill": ("sage_kvt:backend=tcp,host=127.0.0.1", "one secret"),
        "secret": ("sage_kvt:backend=tcp,host=127.0.0.1", "another secret"),
        "address": ("sage_kvt:backend=tcp,host=127.0.0.1,advertise_host=192.0.2.1", "one secret"),
    }
    servers = {}
    for name, (connector, secret) in given.items():
        options = VllmOptions(model, scratch, 2048, extra=("--dtype", "float32"), env={SECRET_ENV: secret})
        servers[name] = vllm_server(f"pair-{name}", options, connector)
    plain = vllm_server("pair-plain", VllmOptions(model, scratch, 2048, extra=("--dtype", "float32")), None)
    with running(*servers.values(), plain):
        for there, here, cause in (
            (servers["prefill"], servers["secret"], "bad_secret"),
            (servers["address"], servers["prefill"], "unreachable"),
            (plain, servers["prefill"], "no_connector"),
            (servers["prefill"], plain, "no_connector"),
        ):
            found = examine_pair(there.url, here.url)[-1]
            assert found.state == "broken" and found.detail.startswith(f"{cause}:"), found
