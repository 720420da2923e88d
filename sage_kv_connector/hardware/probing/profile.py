# SPDX-License-Identifier: Apache-2.0
"""``HardwareProfile``: what ``sage-kvt probe --json`` prints, for people and for control planes.

The schema is published as ``hardware_profile.schema.json`` beside this module
(``python -m scripts.hardware_documents`` writes it).
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sage_kv_connector.hardware.probing.accelerator_descriptor import AcceleratorDescriptor, AnyLinkKind, Fact

#: Raised when a field is removed or changes its meaning; new optional fields don't raise it.
SCHEMA_VERSION = 1
SCHEMA_FILE = "hardware_profile.schema.json"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NumaNode(_Part):
    """A NUMA node of the host."""

    id: int
    cpus: str = Field(description='as the kernel writes it: "0-23,48-71"')


class Platform(_Part):
    """The host."""

    kernel: str
    wsl2: bool
    cpus: int
    numa_nodes: list[NumaNode]


class PciLink(_Part):
    """What sysfs says of a device's PCIe link; wrong behind some switches, so nothing is derived from it alone."""

    speed_gt_s: float | None = None
    width: int | None = None
    max_speed_gt_s: float | None = None
    max_width: int | None = None


class Device(_Part):
    """An accelerator."""

    id: str = Field(description='vendor and index: "ascend0"')
    vendor: str
    index: int = Field(description="what the vendor's runtime calls the device")
    name: str = Field(description="as the vendor's tool prints it, empty if it did not")
    chip: str | None = Field(None, description="the descriptor's name; null if the chip is not in the tables")
    pci_address: str | None = None
    pci_device: str | None = Field(None, description="vendor:device, hex")
    pci: PciLink | None = None
    node: str | None = Field(None, description="device node that is present")
    numa_node: Fact[int] | None = None
    memory_bytes: Fact[int] | None = None
    descriptor: AcceleratorDescriptor | None = None


class Link(_Part):
    """A way between two ends: device ids, names of network devices, "host" or "network"."""

    a: str
    b: str
    kind: AnyLinkKind
    path: str = Field("", description="the tool's own word: HCCS_SW, PIX, NV18 …")
    bytes_per_s: Fact[float] | None = Field(None, description="one direction")
    latency_us: Fact[float] | None = None
    hops: Fact[int] | None = None
    max_packet_bytes: Fact[int] | None = None
    up: bool | None = Field(None, description="state of a port; null where there is none")
    source: str = Field(description="the tool or file that shows the link")


class RdmaDevice(_Part):
    """A port of an RDMA device."""

    name: str
    port: int
    layer: Literal["roce", "infiniband"]
    active: bool
    bytes_per_s: Fact[float] | None
    max_packet_bytes: Fact[int] | None
    pci_address: str | None
    numa_node: int | None
    interface: str | None = Field(None, description="network interface that carries it (RoCE)")
    software: bool = Field(
        False, description="soft-RoCE: the kernel's emulation over that interface, no NIC's RDMA"
    )


class Interface(_Part):
    """A network interface (loopback, bridges and virtual pairs left out)."""

    name: str
    up: bool
    bytes_per_s: Fact[float] | None
    mtu: int | None
    pci_address: str | None
    numa_node: int | None


class Note(_Part):
    """Something a reader should know: a missing tool, two sources that disagree."""

    about: str
    text: str


class Measurement(_Part):
    """One timed thing."""

    name: str
    subject: str = Field(description="device id, network device or host")
    value: float
    unit: Literal["bytes/s", "us"]
    how: str


class Recommendation(_Part):
    """What to set, and why."""

    preset: str
    backend: str
    would_choose: str = Field(
        description="the backend this hardware is best used with, in this release or not"
    )
    config: dict[str, Any] = Field(description="options of KVTransportConfig")
    reasons: list[str]


class HardwareProfile(_Part):
    """Everything the probe found."""

    schema_version: Literal[1] = 1
    origin: str = Field(description='"this machine" or the recording')
    platform: Platform
    devices: list[Device]
    links: list[Link]
    rdma: list[RdmaDevice]
    interfaces: list[Interface]
    measurements: list[Measurement] = Field(default_factory=list)
    notes: list[Note]
    recommendation: Recommendation | None = None


def schema() -> dict[str, Any]:
    """The JSON schema of a profile."""
    made = HardwareProfile.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


def published_schema() -> dict[str, Any]:
    """The schema as it ships."""
    text = (files("sage_kv_connector.hardware.probing") / SCHEMA_FILE).read_text()
    loaded: dict[str, Any] = json.loads(text)
    return loaded
