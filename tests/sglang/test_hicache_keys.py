# SPDX-License-Identifier: Apache-2.0
"""Who shares pages in a store, and what the HiCache backend's options may be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sage_kv_connector.integrations.sglang.hicache_keys import page_namespace
from sage_kv_connector.integrations.sglang.hicache_options import HiCacheOptions
from sage_kv_connector.integrations.sglang.options import CONFIG_ENV

RANK = {
    "model_name": "model", "is_mla_model": False, "tp_rank": 1, "tp_size": 2, "pp_rank": 0, "pp_size": 1,
    "attn_cp_rank": 0, "attn_cp_size": 1, "dp_rank": 0,
}  # fmt: skip
POOL = {
    "layout": "page_first_direct", "page_size": 16, "dtype": "torch.bfloat16", "layer_num": 4, "start_layer": 0,
    "end_layer": 4, "head_num": 2, "head_dim": 64,
}  # fmt: skip


def namespace(rank: dict[str, Any] | None = None, pool: dict[str, Any] | None = None, **more: Any) -> str:
    return page_namespace(
        SimpleNamespace(**{**RANK, **(rank or {})}),
        SimpleNamespace(**{**POOL, **(pool or {})}),
        more.get("pieces", (512, 512)),
        more.get("name", ""),
        more.get("weights", ""),
    )


def test_the_weights_tell_models_apart_not_their_served_names() -> None:
    assert namespace(weights="a") == namespace({"model_name": "other"}, weights="a")
    assert namespace(weights="a") != namespace(weights="b")


def test_two_servers_of_one_model_share() -> None:
    assert namespace() == namespace()
    assert namespace({"dp_rank": 3}) == namespace()
    assert len(namespace()) == 32


@pytest.mark.parametrize(
    "change",
    [
        {"rank": {"model_name": "other"}}, {"rank": {"model_name": None}}, {"rank": {"tp_rank": 0}},
        {"rank": {"tp_size": 4}}, {"rank": {"pp_rank": 1}}, {"rank": {"pp_size": 2}},
        {"rank": {"attn_cp_rank": 1}}, {"rank": {"attn_cp_size": 2}}, {"rank": {"is_mla_model": True}},
        {"pool": {"layout": "layer_first"}}, {"pool": {"page_size": 32}}, {"pool": {"dtype": "torch.float16"}},
        {"pool": {"layer_num": 5}}, {"pool": {"start_layer": 4}}, {"pool": {"head_num": 4}},
        {"pool": {"head_dim": 128}}, {"pool": {"kv_lora_rank": 512}}, {"pool": {"storage_format_tag": "x"}},
        {"pieces": (1024,)}, {"name": "finetuned"},
    ],
)  # fmt: skip
def test_any_difference_separates(change: dict[str, Any]) -> None:
    assert namespace(**change) != namespace()


def test_replicas_of_a_latent_share_whatever_their_rank() -> None:
    latent = {"is_mla_model": True, "tp_rank": 0}
    assert namespace(latent) == namespace({**latent, "tp_rank": 3, "tp_size": 8})
    assert namespace(latent) != namespace({**latent, "dcp_rank": 1, "dcp_size": 2})


GOOD = {"backend_name": "sage_kvt", "module_path": "m", "class_name": "c", "address": "tcp://h:1"}


def test_options_come_from_the_extra_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG_ENV, "backend=tcp,lease_s=3")
    options = HiCacheOptions.load(GOOD)
    assert options.addresses == ("tcp://h:1",) and options.deadline_s == 5.0
    assert options.transport.backend == "tcp" and options.transport.lease_s == 3
    given = {**GOOD, "address": ["shm://x", "tcp://h:1"], "deadline_s": 2, "namespace": "n"}
    options = HiCacheOptions.load({**given, "transport": {"backend": "shm"}, "interface_v1": 1})
    assert options.addresses == ("shm://x", "tcp://h:1")
    assert (options.deadline_s, options.namespace, options.transport.backend) == (2.0, "n", "shm")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"address": None}, "address is None"),
        ({"address": []}, "address is \\[\\]"),
        ({"address": [1]}, "address is \\[1\\]"),
        ({"adress": "x"}, "extra config has adress; allowed: address"),
        ({"deadline_s": 0}, "deadline_s is 0"),
        ({"deadline_s": float("inf")}, "deadline_s is inf"),
        ({"deadline_s": float("nan")}, "deadline_s is nan"),
        ({"deadline_s": "5"}, "deadline_s is '5'"),
        ({"deadline_s": True}, "deadline_s is True"),
        ({"namespace": 3}, "namespace is 3"),
        ({"transport": "tcp"}, "transport is 'tcp'"),
        ({"transport": {"backend": "carrier pigeon"}}, "carrier pigeon"),
    ],
)
def test_bad_options_are_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        HiCacheOptions.load({**GOOD, **change})
