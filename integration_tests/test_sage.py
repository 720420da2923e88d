# SPDX-License-Identifier: Apache-2.0
"""The real SAGE packages over the transport: sageLLM's transfers, the sage CLI, its gateway, vLLM behind it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sagellm_kv_cache", reason="the SAGE packages want Python 3.11")

import torch
from sagellm_comm import CommBackend, CommOp, get_comm_backend
from sagellm_kv_cache.errors import KVTransferFailedError
from sagellm_kv_cache.transfer import (
    CommTransferBackendAdapter,
    KVHandle,
    KVTransferEngine,
    KVTransferPipeline,
)
from sagellm_protocol.pd_sep_types import KVTransferRequest, KVTransferState

with pytest.MonkeyPatch.context() as _without:
    # isagellm-backend loads vLLM's AVX-512 extension, which ends the process on other CPUs.
    _without.setitem(sys.modules, "vllm", None)
    from sagellm_core.pd.kv_channel import KVTransferChannel

from integration_tests.recall import words
from integration_tests.sage_engine import Engine
from integration_tests.sage_rank import NBYTES, pattern
from integration_tests.tcp_proxy import TcpProxy
from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.chunk import DeviceSpec
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.integrations.sage.comm_backend import SageKvtCommBackend, register
from sage_kv_connector.integrations.sage.payload import Tagged
from sage_kv_connector.telemetry.recording.publishing import DIRECTORY_ENV

RECALL_MODEL = Path(__file__).parent / "recall_model"
Backends = list[SageKvtCommBackend]


def world(size: int, **options: Any) -> Backends:
    """Ranks in threads of this process that came together by ``init``."""
    port = free_port()
    made = [SageKvtCommBackend(KVTransportConfig.load({"deadline_s": 30, **options})) for _ in range(size)]
    with ThreadPoolExecutor(size) as pool:
        for done in [pool.submit(one.init, rank, size, "127.0.0.1", port) for rank, one in enumerate(made)]:
            done.result(30)
    return made


def together(*calls: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [done.result(60) for done in [pool.submit(call) for call in calls]]


def handle() -> Any:
    return KVHandle(handle_id=uuid.uuid4(), num_tokens=16)


@pytest.fixture(scope="module", params=["shm", "tcp"])
def pair(request: pytest.FixtureRequest) -> Iterator[Backends]:
    made = world(2, backend=request.param)
    yield made
    for one in made:
        one.destroy()


def test_the_entry_point_is_a_comm_backend() -> None:
    (entry,) = [one for one in entry_points(group="sagellm.comm_backends") if one.name == "sage_kvt"]
    assert isinstance(entry.load()(), CommBackend)
    register()
    register()
    assert isinstance(get_comm_backend("sage_kvt"), SageKvtCommBackend)


@pytest.mark.parametrize(
    "options", [{}, {"enable_checksum": True}, {"enable_compression": True, "enable_checksum": True}]
)
def test_kv_transfer_engine_runs_unmodified(pair: Backends, options: dict[str, bool]) -> None:
    content = os.urandom(1 << 20) + bytes(1 << 20)
    target = bytearray(len(content))
    sender, receiver = KVTransferEngine(pair[0], **options), KVTransferEngine(pair[1], **options)
    sent, received = together(
        lambda: sender.transfer_kv_handle(handle(), 0, 1, content),
        lambda: receiver.transfer_kv_handle(handle(), 0, 1, target),
    )
    assert target == content
    assert (
        sender.get_transfer_status(sent).value == receiver.get_transfer_status(received).value == "completed"
    )


def test_tensors_of_every_kind(pair: Backends) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8):
        source = torch.randn(64, 8, 128).to(dtype)
        target = torch.zeros(64, 8, 128).to(dtype)
        adapters = [CommTransferBackendAdapter(one) for one in pair]
        together(
            lambda s=source, a=adapters: KVTransferEngine(a[0]).transfer_kv_handle(handle(), 0, 1, s),
            lambda t=target, a=adapters: KVTransferEngine(a[1]).transfer_kv_handle(handle(), 0, 1, t),
        )
        assert torch.equal(source.view(torch.uint8), target.view(torch.uint8))
    strided = torch.zeros(8, 32)[:, ::2]
    expected = torch.randn(16, 8).T
    together(lambda: pair[0].send(expected, 1), lambda: pair[1].recv(strided, 0))
    assert torch.equal(strided, expected)


def test_a_pipeline_of_four_workers_pairs_by_tag(pair: Backends) -> None:
    handles = [handle() for _ in range(32)]
    contents = [os.urandom(1 << 18) for _ in handles]
    targets = [bytearray(1 << 18) for _ in handles]
    pipelines = [KVTransferPipeline(KVTransferEngine(one), max_workers=4) for one in pair]
    futures = []
    for one, content, target in zip(handles, contents, targets, strict=True):
        tag = str(one.handle_id)
        futures.append(pipelines[0].submit(one, 0, 1, Tagged(content, tag)))
        futures.append(pipelines[1].submit(one, 0, 1, Tagged(target, tag)))
    for future in futures:
        future.result(60)
    for pipeline in pipelines:
        assert pipeline.get_stats()["failed"] == 0
        pipeline.shutdown()
    assert targets == contents


def test_a_kv_channel_of_prefill_and_decode(pair: Backends) -> None:
    """sagellm_core's KVTransferChannel, layer by layer."""
    layers = [{"k": torch.randn(16, 2, 64), "v": torch.randn(16, 2, 64)} for _ in range(4)]
    meta = KVTransferRequest(
        request_id="r", trace_id="t", src_engine_id="p", dst_engine_id="d", src_rank=0, dst_rank=1,
        num_layers=4, num_tokens=16, num_heads=2, head_dim=64, dtype="float32",
    )  # fmt: skip
    channels = [KVTransferChannel(pair[0], 0, 1), KVTransferChannel(pair[1], 1, 0)]
    result, received = together(
        lambda: asyncio.run(channels[0].send_kv(layers, meta)), lambda: asyncio.run(channels[1].recv_kv(meta))
    )
    assert result.state is KVTransferState.DONE
    for ours, theirs in zip(received, layers, strict=True):
        assert torch.equal(ours["k"], theirs["k"]) and torch.equal(ours["v"], theirs["v"])


def test_collectives() -> None:
    ranks = world(3)
    try:
        tensors = [torch.arange(6.0) * (rank + 1) for rank in range(3)]
        for op, expected in (
            (CommOp.SUM, tensors[0] + tensors[1] + tensors[2]),
            (CommOp.MAX, tensors[2]),
            (CommOp.MIN, tensors[0]),
            (CommOp.PROD, tensors[0] * tensors[1] * tensors[2]),
            (CommOp.AVG, (tensors[0] + tensors[1] + tensors[2]) / 3),
        ):
            copies = [one.clone() for one in tensors]
            together(
                *(lambda r=r, c=c, op=op: r.all_reduce(c, op) for r, c in zip(ranks, copies, strict=True))
            )
            assert all(torch.equal(one, expected) for one in copies)
        gathered = together(*(lambda r=r, t=t: r.all_gather(t) for r, t in zip(ranks, tensors, strict=True)))
        assert all(torch.equal(a, b) for one in gathered for a, b in zip(one, tensors, strict=True))
        together(*(one.barrier for one in ranks))
        group = ranks[0].create_group([2, 0])
        assert group.ranks == [0, 2]
        with pytest.raises(ValueError, match=r"ranks is \[0, 5\]; allowed: one or more of \[0, 1, 2\]"):
            ranks[0].create_group([0, 5])
    finally:
        for one in ranks:
            one.destroy()


def test_a_corrupted_byte_is_caught() -> None:
    """Over TCP through a proxy that flips a bit: an error on both sides, and the next try is right."""
    port = free_port()
    proxy = TcpProxy(port)
    sender = SageKvtCommBackend(
        KVTransportConfig.load(
            {"backend": "tcp", "port": port, "advertise_port": proxy.port, "deadline_s": 20}
        )
    )
    receiver = SageKvtCommBackend(KVTransportConfig.load({"backend": "tcp", "deadline_s": 20}))
    try:
        table: dict[int, DeviceSpec] = {0: sender.open(0), 1: receiver.open(1)}
        sender.join(table)
        receiver.join(table)
        content, target = os.urandom(4 << 20), bytearray(4 << 20)
        engines = KVTransferEngine(sender), KVTransferEngine(receiver)
        together(
            lambda: engines[0].transfer_kv_handle(handle(), 0, 1, content),
            lambda: engines[1].transfer_kv_handle(handle(), 0, 1, target),
        )
        assert target == content
        proxy.flip_byte_at(1 << 20)
        failed: list[str] = []

        def fails(engine: Any, payload: Any) -> None:
            with pytest.raises(KVTransferFailedError) as error:
                engine.transfer_kv_handle(handle(), 0, 1, payload)
            failed.append(str(error.value))

        together(lambda: fails(engines[0], content), lambda: fails(engines[1], bytearray(4 << 20)))
        assert all("checksum_mismatch" in one for one in failed), failed
        again = bytearray(4 << 20)
        together(
            lambda: engines[0].transfer_kv_handle(handle(), 0, 1, content),
            lambda: engines[1].transfer_kv_handle(handle(), 0, 1, again),
        )
        assert again == content
    finally:
        sender.destroy()
        receiver.destroy()
        proxy.close()


@pytest.mark.parametrize("backend", ["shm", "tcp"])
def test_a_peer_that_is_killed_ends_with_an_error(backend: str) -> None:
    port = free_port()
    peer = subprocess.Popen(
        [sys.executable, "-m", "integration_tests.sage_rank", str(port), backend], stdout=subprocess.PIPE
    )
    receiver = SageKvtCommBackend(KVTransportConfig.load({"backend": backend, "deadline_s": 30}))
    try:
        receiver.init(1, 2, "127.0.0.1", port)
        engine, target = KVTransferEngine(receiver), bytearray(NBYTES)
        engine.transfer_kv_handle(handle(), 0, 1, target)
        assert target == pattern()
        threading.Timer(0.3, peer.kill).start()
        begun = time.monotonic()
        with pytest.raises(KVTransferFailedError):
            for _ in range(1000):
                engine.transfer_kv_handle(handle(), 0, 1, target)
        assert time.monotonic() - begun < 20
    finally:
        peer.kill()
        peer.wait()
        receiver.destroy()


def sage(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).with_name("sage")), *words],
        capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "160"}, cwd=cwd,
    )  # fmt: skip


def test_the_sage_command_has_ours() -> None:
    shown = sage("transport", "--help")
    assert shown.returncode == 0 and "WARNING" not in shown.stderr
    for name in ("probe", "bench", "presets", "doctor"):
        assert name in shown.stdout and sage("transport", name, "--help").returncode == 0
    probed = sage("transport", "probe", "--json")
    assert json.loads(probed.stdout.splitlines()[-1])["recommendation"]["backend"]
    for way in (["llm"], ["advanced", "llm"]):
        serve = sage(*way, "serve", "--help").stdout
        assert "--kv-transport" in serve and "--model" in serve


def test_a_bad_option_starts_nothing(tmp_path: Path) -> None:
    refused = sage("llm", "serve", "--mock", "--kv-transport", "backend=carrier-pigeon", cwd=tmp_path)
    assert refused.returncode == 2 and "backend is 'carrier-pigeon'" in refused.stderr
    assert not list(tmp_path.iterdir())


def get(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())


def test_sage_llm_serve_hands_kv_over_between_vllm_servers(tmp_path: Path) -> None:
    """The whole way: SAGE's CLI and gateway, two vLLM servers, our options in both, equal bytes."""
    port, audit = free_port(), tmp_path / "audit.jsonl"
    audit.touch()
    with (tmp_path / "log").open("w") as log:
        served = subprocess.Popen(
            [str(Path(sys.executable).with_name("sage")), "llm", "serve", "--model", str(RECALL_MODEL),
             "--host", "127.0.0.1", "--port", str(port), "--kv-engine", "vllm",
             "--kv-transport", "preset=low-latency", "--kv-transport", "backend=tcp",
             "--kv-transport", "host=127.0.0.1", "--kv-transport", f"audit-file={audit}"],
            stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path, start_new_session=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", DIRECTORY_ENV: str(tmp_path / "telemetry")},
        )  # fmt: skip
    try:
        until = time.monotonic() + 200
        while True:
            try:
                get(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                assert served.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()[
                    -3000:
                ]
                time.sleep(0.5)
        written = KVTransportConfig.from_file(tmp_path / "kv_transport.yaml")
        assert (written.preset, written.backend) == ("low-latency", "tcp")
        prompt = " ".join(words()[3:] * 1)[:2000]
        answer = get(
            f"http://127.0.0.1:{port}/v1/completions",
            {"model": str(RECALL_MODEL), "prompt": prompt, "max_tokens": 4, "temperature": 0},
        )
        assert answer["usage"]["completion_tokens"] == 4
        until = time.monotonic() + 10
        while len(records := [json.loads(line) for line in audit.read_text().splitlines()]) < 2:
            assert time.monotonic() < until, records
            time.sleep(0.1)
        assert {one["side"] for one in records} == {"producer", "consumer"}
        assert records[0]["sha256"] == records[1]["sha256"] and records[0]["backend"] == "tcp"
        card = get(f"http://127.0.0.1:{port}/kv-transport/card.json")
        moved = [(one["record"]["side"], one["record"]["nbytes"]) for one in card["transfers"]]
        assert sorted(moved) == [("decode", records[0]["nbytes"]), ("prefill", records[0]["nbytes"])]
        assert {one["backend"] for one in card["choices"]} == {"tcp"}
    finally:
        served.send_signal(signal.SIGTERM)
        served.wait(60)
    ours = [one for one in Path("/proc").iterdir() if one.name.isdigit() and _speaks_of(one, str(tmp_path))]
    assert not ours, "servers were left behind"


def _speaks_of(process: Path, text: str) -> bool:
    try:
        return text in (process / "cmdline").read_text()
    except OSError:
        return False


def test_vllm_behind_inference_backend(tmp_path: Path) -> None:
    audit = tmp_path / "audit.jsonl"
    audit.touch()
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
           "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # fmt: skip
    options = {"host": "127.0.0.1", "audit_file": str(audit), "backend": "shm"}
    engine = {"enforce_eager": True, "dtype": "float32", "max_model_len": 1024, "seed": 0}
    prefill, decode = (Engine("vllm", RECALL_MODEL, options, engine, env) for _ in range(2))
    try:
        prefill.ready()
        decode.ready()
        (registered,) = prefill.call("register_kv")
        assert registered[2]["total_layers"] == 3 and registered[2]["dtype"] == "fp32"
        assert decode.call("transport_plan", registered)["backend"] == "shm"
        other = [*registered[:2], {**registered[2], "head_dim": 80}, *registered[3:]]
        assert "head_dim: 64 here, 80 at the peer" in decode.call("transport_plan", other)["error"]
        prompt = [3 + index * 7 % 500 for index in range(600)]
        prefilled = prefill.call("prefill", "r1", prompt)
        answer = decode.call("decode", prefilled, 6)
        records = [json.loads(line) for line in audit.read_text().splitlines()]
        assert len(records) == 2 and records[0]["sha256"] == records[1]["sha256"]
        assert records[0]["nbytes"] > 0
        alone = prefill.call("decode", [*prefilled[:3], {}], 6)
        assert answer == alone and answer[1][0] == prefilled[2]
        assert "prompt is empty" in prefill.call("prefill", "r2", [])["error"]
    finally:
        prefill.stop()
        decode.stop()
