# SPDX-License-Identifier: Apache-2.0
"""Real servers, started once for all tests; each in another of the ways a user may ask for the connector."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from integration_tests.cluster import TIMES, Cluster, learn
from integration_tests.request_pair import CHAT_TEMPLATE
from integration_tests.tcp_proxy import TcpProxy
from sage_kv_connector.config import SECRET_ENV
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.launch.process import core_halves, running
from sage_kv_connector.launch.tiny_model import build
from sage_kv_connector.launch.vllm import VllmOptions, router, vllm_server

MAX_MODEL_LEN = 8192 + 512
#: fp32, so that neither chunking nor batching changes a greedy token.
COMMON = ("--dtype", "float32", "--max-num-batched-tokens", "2048", "--chat-template", CHAT_TEMPLATE)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run cases marked full too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    for item in items:
        if item.get_closest_marker("full"):
            item.add_marker(pytest.mark.skip(reason="make test-full runs it"))


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="session")
def model(scratch: Path) -> Path:
    return build(scratch, "small")


@pytest.fixture(scope="session")
def secret() -> dict[str, str]:
    return {SECRET_ENV: secrets.token_urlsafe(16)}


@pytest.fixture(scope="session")
def cluster(scratch: Path, model: Path, secret: dict[str, str]) -> Iterator[Cluster]:
    audit = scratch / "audit.jsonl"
    audit.touch()
    tcp_port, bootstrap_port = free_port(), free_port()
    proxy = TcpProxy(tcp_port)
    # So that what a CRC is for is seen, too.
    common = {"host": "127.0.0.1", "audit_file": str(audit), "security": "none", **TIMES}
    first, second = core_halves()

    by_name = {
        "kv_connector": "sage_kvt",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {
            **common,
            "port": tcp_port,
            "advertise_port": proxy.port,
            "bootstrap_port": bootstrap_port,
        },
    }
    small_pool = VllmOptions(
        model, scratch, MAX_MODEL_LEN, extra=(*COMMON, "--num-gpu-blocks-override", "256"), env=secret
    )
    prefill = vllm_server("prefill", small_pool, by_name, first)

    words = ",".join(f"{key}={value}" for key, value in common.items())
    options = VllmOptions(model, scratch, MAX_MODEL_LEN, extra=COMMON, env=secret)
    decode_shm = vllm_server("decode-shm", options, f"sage_kvt:{words}", second)

    in_yaml = scratch / "decode-tcp.yaml"
    by_path = {
        "kv_connector": "SageKVConnector",
        "kv_connector_module_path": "sage_kv_connector.integrations.vllm.connector",
        "kv_role": "kv_consumer",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {**common, "backend": "tcp"},
    }
    in_yaml.write_text(yaml.safe_dump({"kv-transfer-config": by_path}))
    with_yaml = VllmOptions(
        model, scratch, MAX_MODEL_LEN,
        extra=(*COMMON, "--config", str(in_yaml), "--num-gpu-blocks-override", "80"),
        env={**secret, "VLLM_PLUGINS": ""},
    )  # fmt: skip
    decode_tcp = vllm_server("decode-tcp", with_yaml, None, second)

    sequential = router(prefill, decode_shm, scratch, dispatch="sequential", bootstrap_port=bootstrap_port)
    concurrent = router(prefill, decode_shm, scratch)
    with running(prefill, decode_shm, decode_tcp), running(sequential, concurrent):
        learn(concurrent)
        audit.write_text("")
        bootstrap = f"http://127.0.0.1:{bootstrap_port}"
        yield Cluster(model, prefill, decode_shm, decode_tcp, sequential, concurrent, proxy, audit, bootstrap)
    proxy.close()
