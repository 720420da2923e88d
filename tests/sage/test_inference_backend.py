# SPDX-License-Identifier: Apache-2.0
"""InferenceBackend without an engine: names, roles, handovers, plans, and what SGLang's ranks leave for it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_kv_connector.config import SECRET_ENV, SECRET_FILE_ENV, KVTransportConfig
from sage_kv_connector.contract.node import node_id
from sage_kv_connector.contract.peer import RegisteredKV
from sage_kv_connector.contract.schema import CanonicalPlaneSchema, GroupSchema, KVCacheSchema, PlaneSchema
from sage_kv_connector.integrations.sage import sglang_backend
from sage_kv_connector.integrations.sage.inference_backend import (
    BackendUnavailable,
    IncompatibleCaches,
    create_backend,
    plan_between,
)
from sage_kv_connector.integrations.sglang.options import options_from_environment
from sage_kv_connector.integrations.sglang.registered import DIRECTORY_ENV, read_ranks, write_rank

HANDOVER = {"bootstrap_host": "127.0.0.1", "bootstrap_port": 8998, "bootstrap_room": 7}


def schema(head_dim: int = 64, page_size: int = 16) -> KVCacheSchema:
    axes = (("token", page_size), ("head", 2), ("dim", head_dim))
    group = GroupSchema(
        kind="fullattention",
        layers=("model.layers.0.self_attn.attn",),
        page_size=page_size,
        planes=tuple(PlaneSchema(name, axes, page_size * 2 * head_dim * 4) for name in ("k", "v")),
        canonical=(CanonicalPlaneSchema("k", head_dim), CanonicalPlaneSchema("v", head_dim)),
    )
    return KVCacheSchema(
        engine="sglang", model="m", dtype="fp32", total_layers=1, total_kv_heads=2, head_start=0,
        head_count=2, head_dim=head_dim, groups=(group,),
    )  # fmt: skip


def registered(**changed: Any) -> RegisteredKV:
    return RegisteredKV("p", 0, schema(), ("shm://p", "tcp://10.0.0.1:7000"), node_id())._replace(**changed)


def test_unknown_engines_and_roles_are_named() -> None:
    with pytest.raises(ValueError, match="'llama' is unknown; allowed: vllm, sglang"):
        create_backend("llama", "m")
    wrong: list[dict[str, Any]] = [{}, {"role": "both"}]
    for role in wrong:
        with pytest.raises(ValueError, match=r"role is '(both)?'; allowed for sglang: prefill, decode"):
            create_backend("sglang", "m", **role)
    with pytest.raises(ValueError, match="disaggregation_mode follows from role"):
        create_backend("sglang", "m", role="decode", disaggregation_mode="prefill")


@pytest.mark.skipif(find_spec("sglang") is not None, reason="sglang is installed here")
def test_an_engine_that_is_not_installed_is_named() -> None:
    with pytest.raises(BackendUnavailable, match="sglang is not installed"):
        create_backend("sglang", "m", role="prefill")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("host", ""),
        ("host", 5),
        ("port", 0),
        ("port", True),
        ("port", "8998"),
        ("room", -1),
        ("room", 1 << 63),
    ],
)
def test_a_handover_is_checked_field_by_field(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"handover.bootstrap_{name} is "):
        sglang_backend._bootstrap_fields({**HANDOVER, f"bootstrap_{name}": value})
    with pytest.raises(ValueError, match=f"handover.bootstrap_{name} is None"):
        sglang_backend._bootstrap_fields(
            {key: one for key, one in HANDOVER.items() if not key.endswith(name)}
        )


@given(handover=st.dictionaries(st.sampled_from([*HANDOVER, "other"]), st.integers() | st.text() | st.none()))
def test_any_handover_is_taken_or_refused(handover: dict[str, Any]) -> None:
    try:
        assert set(sglang_backend._bootstrap_fields(handover)) == set(HANDOVER)
    except ValueError:
        pass


def test_a_bootstrap_server_nobody_can_reach_is_refused() -> None:
    assert sglang_backend._reachable("10.0.0.5", KVTransportConfig()) == "10.0.0.5"
    assert sglang_backend._reachable("0.0.0.0", KVTransportConfig(advertise_host="node-1")) == "node-1"
    with pytest.raises(ValueError, match=r"host is '0\.0\.0\.0'.*set advertise_host"):
        sglang_backend._reachable("0.0.0.0", KVTransportConfig())


def test_a_plan_is_foretold_from_both_schemas() -> None:
    plan = plan_between(schema(), registered(), KVTransportConfig())
    assert (plan.backend, plan.wire_dtype, plan.checksum) == ("shm", "same", False)
    elsewhere = registered(node="another machine")
    assert plan_between(schema(), elsewhere, KVTransportConfig()).backend == "tcp"
    with pytest.raises(IncompatibleCaches, match="head_dim: 64 here, 80 at the peer"):
        plan_between(schema(), registered(schema=schema(80)), KVTransportConfig())
    with pytest.raises(ValueError, match="none of it can be reached with backend shm"):
        plan_between(schema(), elsewhere, KVTransportConfig(backend="shm"))


def test_ranks_leave_what_they_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cores: list[Any] = [
        SimpleNamespace(engine_id=f"e{rank}", rank=rank, addresses=(f"shm://{rank}",)) for rank in (11, 2, 0)
    ]
    write_rank(cores[0], schema())  # nobody asked
    monkeypatch.setenv(DIRECTORY_ENV, str(tmp_path))
    for core in cores:
        write_rank(core, schema())
    assert [(one.rank, one.engine_id) for one in read_ranks(tmp_path)] == [(0, "e0"), (2, "e2"), (11, "e11")]
    assert read_ranks(tmp_path)[0] == RegisteredKV("e0", 0, schema(), ("shm://0",), node_id())
    (tmp_path / "rank-1").write_bytes(msgspec.msgpack.encode([1, 2]))
    with pytest.raises(ValueError, match="rank-1 does not hold what a rank registered"):
        read_ranks(tmp_path)


def test_a_secret_reaches_sglangs_processes_by_a_file_of_their_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECRET_ENV, "of the shell")
    with sglang_backend._environment(KVTransportConfig.load({"secret": "mine of all"}), tmp_path):
        child = [sys.executable, "-c", "import os, time; print(dict(os.environ), flush=True)"]
        seen = subprocess.run(child, capture_output=True, text=True, check=True).stdout
        assert "mine of all" not in seen and "of the shell" not in seen
        assert options_from_environment().resolved_secret() == b"mine of all"
        assert (tmp_path / "secret").stat().st_mode & 0o077 == 0
    assert os.environ[SECRET_ENV] == "of the shell" and SECRET_FILE_ENV not in os.environ
