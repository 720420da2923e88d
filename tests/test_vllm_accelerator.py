# SPDX-License-Identifier: Apache-2.0
"""Which runtime serves KV tensors on an accelerator (emulated devices, no torch device)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sage_kv_connector.devices.runtime import RuntimeUnavailable
from sage_kv_connector.integrations.vllm import accelerator
from sage_kv_connector.vendors import open_runtime
from sage_kv_connector.vendors.emulator import EmulatorSettings


class Device(SimpleNamespace):
    def __str__(self) -> str:
        return f"{self.type}:{self.index}"


def tensor(kind: str, index: int | None = None) -> Any:
    return SimpleNamespace(device=Device(type=kind, index=index))


def test_host_tensors_need_no_device() -> None:
    assert accelerator.device_of([tensor("cpu"), tensor("cpu")]) is None


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ([tensor("cuda", 0), tensor("cuda", 1)], "cuda:0, cuda:1: must be one device"),
        ([tensor("cuda", 0), tensor("cpu")], "must be one device"),
        ([tensor("tpu", 0)], "tpu:0; allowed: cpu, cuda, mlu, npu, xpu"),
    ],
)
def test_what_is_refused(tensors: list[Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        accelerator.device_of(tensors)


@pytest.mark.parametrize(
    ("kind", "present", "vendor"),
    [("npu", "ascend", "ascend"), ("cuda", "nvidia", "nvidia"), ("cuda", "kunlunxin", "kunlunxin")],
)
def test_the_vendor_whose_library_works_is_taken(
    monkeypatch: pytest.MonkeyPatch, kind: str, present: str, vendor: str
) -> None:
    def opened(name: str) -> Any:
        if name != present:
            raise RuntimeUnavailable(f"no library of {name}")
        return open_runtime(name, EmulatorSettings(devices=2))

    monkeypatch.setattr(accelerator, "open_runtime", opened)
    monkeypatch.setattr(accelerator, "_torch_build", lambda: None)
    device = accelerator.device_of([tensor(kind, 1)])
    memory = accelerator.open_device(device)
    assert (memory.runtime.vendor, memory.number) == (vendor, 1)


def test_no_library_at_all_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(name: str) -> Any:
        raise RuntimeUnavailable(f"no library of {name}")

    monkeypatch.setattr(accelerator, "open_runtime", opened)
    with pytest.raises(
        RuntimeUnavailable, match="npu:0, and no vendor's library works: no library of ascend"
    ):
        accelerator.open_device(Device(type="npu", index=0))
