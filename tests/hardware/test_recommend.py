# SPDX-License-Identifier: Apache-2.0
"""The recommendation: right for each machine, valid in this release and in a later one."""

from __future__ import annotations

import pytest
import yaml

from sage_kv_connector.backends import BACKENDS
from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.hardware.report.recommend import recommend
from tests.hardware.recorded import NAMES, RECORDINGS, profile_of

LATER = ("rdma", "pcie", "shm", "tcp")


@pytest.mark.parametrize("name", sorted(path.parent.name for path in RECORDINGS.glob("*/recommended.yaml")))
def test_each_machine_gets_what_suits_it(name: str) -> None:
    suits = yaml.safe_load((RECORDINGS / name / "recommended.yaml").read_text())
    profile = profile_of(name)
    later = recommend(profile, LATER)
    assert (later.preset, later.backend, later.would_choose) == (
        suits["preset"],
        suits["best"],
        suits["best"],
    )
    assert recommend(profile, ("pcie", "shm", "tcp")).backend == suits["without_rdma"]


def test_wsl2_falls_back_to_pcie_then_tcp() -> None:
    choice = recommend(profile_of("wsl2"), ("shm", "tcp"))
    assert choice.config["backend"] == "tcp" and choice.would_choose == "pcie"
    assert any(reason.startswith("WSL2") for reason in choice.reasons)
    assert "pcie can't be used here, it is not part of this release: tcp is the next best" in choice.reasons
    bare = profile_of("wsl2").model_copy(update={"devices": []})
    assert recommend(bare, LATER).backend == "tcp"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_recommended_can_be_used_in_this_release(name: str) -> None:
    choice = recommend(profile_of(name))
    config = KVTransportConfig.load(choice.config)
    assert config.backend in ("auto", *BACKENDS) and config.preset == choice.preset
    assert choice.reasons


def test_soft_roce_is_no_rdma() -> None:
    profile = profile_of("soft_roce")
    choice = recommend(profile, LATER)
    assert (choice.would_choose, choice.preset) == ("auto", "low-latency")
    assert any(reason.startswith("rxe0 is soft-RoCE") for reason in choice.reasons)


def test_what_the_machine_lacks_is_not_recommended() -> None:
    profile = profile_of("ascend_a2")
    choice = recommend(profile, LATER, {"rdma": "librdmacm.so.1 was not found"})
    assert recommend(profile, LATER).backend == choice.would_choose == "rdma" and choice.backend == "pcie"
    assert recommend(profile, LATER).config["backend"] == "auto", "peers on the same node need more than rdma"
    assert "rdma can't be used here, librdmacm.so.1 was not found: pcie is the next best" in choice.reasons


def test_few_cores_get_one_lane() -> None:
    choice = recommend(profile_of("host_only"))
    assert KVTransportConfig.load(choice.config).overlap_streams == 1
    assert any("2 cores" in reason for reason in choice.reasons)


def test_a_slow_network_s_trade_off_is_said() -> None:
    assert any("costs some accuracy" in reason for reason in recommend(profile_of("ascend_pcie")).reasons)
