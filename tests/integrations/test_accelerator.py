# SPDX-License-Identifier: Apache-2.0
"""Which runtime serves KV on an accelerator (emulated devices, no torch device)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sage_kv_connector.devices.runtime import RuntimeUnavailable
from sage_kv_connector.hardware.report.descriptors import descriptors
from sage_kv_connector.integrations.common import accelerator
from sage_kv_connector.vendors import VENDORS, open_runtime
from sage_kv_connector.vendors.emulator import EmulatorSettings

#: torch's device types, each with a vendor whose cards it may mean.
TORCH = [(kind, vendor) for vendor in VENDORS for kind in descriptors(vendor).torch_devices]


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
        ([tensor("tpu", 0)], f"tpu:0; allowed: cpu, {', '.join(sorted({kind for kind, _ in TORCH}))}"),
    ],
)
def test_what_is_refused(tensors: list[Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        accelerator.device_of(tensors)


@pytest.mark.parametrize(
    ("kind", "vendor"),
    TORCH,
)
def test_the_vendor_whose_library_works_is_taken(
    monkeypatch: pytest.MonkeyPatch, kind: str, vendor: str
) -> None:
    def opened(name: str) -> Any:
        if name != vendor:
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


@pytest.mark.parametrize(("build", "vendors"), [(None, ["nvidia", "hygon", "kunlunxin"]), ("hip", ["hygon"])])
def test_vendors_that_share_a_type_are_tried_in_order(
    monkeypatch: pytest.MonkeyPatch, build: str | None, vendors: list[str]
) -> None:
    """A HIP library may be installed beside NVIDIA's cards; a HIP build of torch means its own vendor alone."""
    names: list[str] = []

    def opened(name: str) -> Any:
        names.append(name)
        raise RuntimeUnavailable(f"no library of {name}")

    monkeypatch.setattr(accelerator, "open_runtime", opened)
    monkeypatch.setattr(accelerator, "_torch_build", lambda: build)
    with pytest.raises(RuntimeUnavailable):
        accelerator.open_device(Device(type="cuda", index=0))
    assert names[: len(vendors)] == vendors
