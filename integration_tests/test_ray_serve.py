# SPDX-License-Identifier: Apache-2.0
"""Ray Serve's prefill/decode app with our connector (``deploy/ray-serve``): two replicas of each, of which some die."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from integration_tests.cluster import TIMES, new_prompt, wait_until
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.launch.process import ServerError, running
from sage_kv_connector.launch.tiny_model import build
from sage_kv_connector.launch.vllm import VllmOptions, complete, vllm_server
from sage_kv_connector.telemetry.reading import sources
from sage_kv_connector.telemetry.recording.publishing import DIRECTORY_ENV

ray = pytest.importorskip("ray", reason="make test-fleets installs it")

pytestmark = pytest.mark.full

CONFIG = Path(__file__).resolve().parent.parent / "deploy" / "ray-serve" / "pd.yaml"
REQUESTS, AT_ONCE = 200, 8
#: How many answers there are when a replica of this side is killed.
KILLED_AFTER = {60: "Prefill", 120: "Decode"}
HELD = ("offers", "loads", "subscriptions", "posts", "windows", "staging_bytes")
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "num_gpu_blocks_override": 128}


class Asked(NamedTuple):
    prompt: list[int]
    right: list[int]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="kvt-ray-"))  # a socket's path may be no longer than 107 bytes
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return build(folder, "small")


@pytest.fixture(scope="module")
def asked(folder: Path, model: Path) -> list[Asked]:
    """Prompts, and what one server without a connector answers."""
    extra = ("--dtype", "float32", "--num-gpu-blocks-override", "128")
    alone = vllm_server("alone", VllmOptions(model, folder, 2048, extra=extra), None)
    prompts = [new_prompt(150 + 7 * (n % 60)) for n in range(REQUESTS)]
    with running(alone), ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(lambda prompt: complete(alone.url, prompt, max_tokens=8), prompts))
    return [Asked(prompt, answer.token_ids) for prompt, answer in zip(prompts, answers, strict=True)]


def app_arguments(model: Path) -> dict[str, Any]:
    """Those that users start from, for a small model on this machine's processors."""
    (app,) = yaml.safe_load(CONFIG.read_text())["applications"]
    sides: dict[str, Any] = copy.deepcopy(app["args"])
    for side in sides.values():
        side["model_loading_config"]["model_source"] = str(model)
        side["engine_kwargs"] |= ENGINE
        side["engine_kwargs"]["kv_transfer_config"]["kv_connector_extra_config"] = dict(TIMES)
        side["placement_group_config"] = {"bundles": [{"CPU": 1}]}
    return sides


@pytest.fixture(scope="module")
def url(folder: Path, model: Path, asked: list[Asked]) -> Iterator[str]:
    from ray import serve
    from ray.serve.llm import build_pd_openai_app

    environment = {
        DIRECTORY_ENV: str(folder / "engines"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
        "RAY_DEDUP_LOGS": "0",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        # More of them than there are: they say how many engines fit.
        ray.init(num_cpus=16, include_dashboard=False, log_to_driver=False)
        try:
            port = free_port()
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            serve.run(build_pd_openai_app(app_arguments(model)), name="kv", route_prefix="/")
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()
            ray.shutdown()


def replicas(side: str) -> list[int]:
    """Processes of that side's replicas."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(f"ray::ServeReplica:kv:{side}".encode()):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_every_answer_is_right_while_replicas_die(url: str, asked: list[Asked], folder: Path) -> None:
    answered, retried = 0, 0
    lock = threading.Lock()
    assert {side: len(replicas(side)) for side in ("Prefill", "Decode")} == {"Prefill": 2, "Decode": 2}

    def ask(one: Asked) -> list[int]:
        nonlocal answered, retried
        for attempt in range(60):
            try:
                answer = complete(url, one.prompt, max_tokens=8, stream=False)
                break
            except ServerError:  # its replica died: a client asks again
                with lock:
                    retried += 1
                assert attempt < 59
                time.sleep(1)
        with lock:
            answered += 1
            side = KILLED_AFTER.get(answered)
        if side is not None:
            os.kill(replicas(side)[0], signal.SIGKILL)
        return answer.token_ids

    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(ask, asked))
    wrong = [n for n, one in enumerate(asked) if answers[n] != one.right]
    assert not wrong
    engines = folder / "engines"
    moved = sum(
        one.value("transfers_total", side="decode", code="ok") for one in sources.local(engines).snapshots
    )
    print(f"{REQUESTS} right, {retried} asked again, {moved:g} handed over to replicas that live")
    assert moved > REQUESTS / 4, "what the killed decode replica got is not counted any more"

    def held() -> dict[str, float]:
        found = sources.local(engines)
        sums = {name: sum(one.value(name) for one in found.snapshots) for name in HELD}
        return {name: value for name, value in sums.items() if value}

    wait_until(lambda: not held(), 30.0, lambda: f"still held: {held()}")
