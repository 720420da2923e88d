# SPDX-License-Identifier: Apache-2.0
"""What is known of an accelerator, each value with its source; read from ``vendors/<vendor>/descriptor.yaml``.

Units: bytes, bytes a second in one direction, microseconds. A value that nobody published is
None ("not known"), never a guess.
"""

from __future__ import annotations

from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Annotated, Generic, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field

T = TypeVar("T")


class Fact(BaseModel, Generic[T]):
    """A value and where it comes from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: T
    source: str = Field(min_length=3, description="document, tool or file that says so")
    measured: bool = Field(False, description="timed on this machine, not taken from a table")
    table_value: T | None = Field(None, description="what the table said before it was measured")

    def overridden(self, value: T, source: str) -> Fact[T]:
        """The same quantity as measured; keeps the table's value beside it."""
        before = self.table_value if self.measured else self.value
        return Fact[T](value=value, source=source, measured=True, table_value=before)


class LinkKind(StrEnum):
    """Kinds of links that are known here; a vendor's descriptor may name another one of its own."""

    hccs = "hccs"
    sio = "sio"
    ub = "ub"
    mlu_link = "mlu-link"
    xgmi = "xgmi"
    hsw = "hsw"
    xpu_link = "xpu-link"
    nvlink = "nvlink"
    pcie = "pcie"
    roce = "roce"
    infiniband = "infiniband"
    tcp = "tcp"
    unknown = "unknown"


#: A kind that is known, or a vendor's own word.
AnyLinkKind = Annotated[
    LinkKind | Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")], Field(union_mode="left_to_right")
]


class LinkFacts(BaseModel):
    """One kind of link of a chip."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: AnyLinkKind
    cells: list[str] = Field(
        default_factory=list,
        description="words of the topology tool that mean this link; NV# stands for NV and a number",
    )
    pair_bytes_per_s: Fact[float] | None = Field(None, description="between two devices, one direction")
    lane_bytes_per_s: Fact[float] | None = Field(
        None, description="one of the links that NV# counts, one direction"
    )
    device_bytes_per_s: Fact[float] | None = Field(
        None, description="all links of one device together, one direction"
    )
    latency_us: Fact[float] | None = None
    hops: Fact[int] | None = Field(None, description="links between the two devices; 2 through a switch")
    max_packet_bytes: Fact[int] | None = None


class AcceleratorDescriptor(BaseModel):
    """One chip."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    chip: str
    vendor: str
    names: list[str] = Field(description="what tools call it; * matches anything, case is ignored")
    pci_devices: list[str] = Field(default_factory=list, description="PCI device ids, hex")
    pci_source: str | None = None
    runtime_api: Fact[str]
    memory_bytes: Fact[int] | None = None
    links: list[LinkFacts]
    dma_alignment_bytes: Fact[int] | None = Field(
        None, description="alignment of allocations that the device's DMA takes at full speed"
    )
    page_sizes: Fact[list[int]] | None = Field(None, description="page table: sizes of device pages")
    sram_window_bytes: Fact[int] | None = Field(
        None, description="on-chip memory that a kernel can stage KV in, of one core (or shared, see source)"
    )
    max_transfer_bytes: Fact[int] | None = Field(None, description="largest single copy")
    kv_formats: Fact[list[str]] | None = Field(None, description="dtypes the chip computes or casts natively")
    network_reads_memory: Fact[str] | None = Field(
        None, description="what lets an RDMA NIC read and write device memory"
    )
    notes: list[str] = Field(default_factory=list)

    def link(self, kind: AnyLinkKind) -> LinkFacts | None:
        """Facts of a kind of link; None if this chip's table has none."""
        return next((link for link in self.links if link.kind == kind), None)

    def link_of_cell(self, cell: str) -> LinkFacts | None:
        """Facts of what the topology tool calls ``cell``."""
        counted = cell.rstrip("0123456789") + "#"
        return next((link for link in self.links if cell in link.cells or counted in link.cells), None)

    def is_named(self, name: str) -> bool:
        """If tools mean this chip by ``name``."""
        low = name.strip().lower()
        return any(fnmatchcase(low, pattern.lower()) for pattern in self.names)


class VendorDescriptors(BaseModel):
    """One vendor's file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vendor: str
    title: str
    pci_vendor: str = Field(description="PCI vendor id, hex")
    pci_classes: list[str] = Field(
        description="what PCI classes of accelerators begin with, hex: 12 accelerator, 03 display"
    )
    pci_source: str
    nodes: str = Field(description="device nodes, as a pattern whose * is the index")
    tools: list[str]
    tool_directories: list[str] = Field(
        default_factory=list, description="where the tools are installed without being on PATH"
    )
    torch_devices: dict[str, int] = Field(
        default_factory=dict,
        description="torch's device types of these cards, each with its turn where several vendors' cards have it",
    )
    torch_build: str | None = Field(
        None,
        description="attribute of torch.version that a build for these cards sets, if its type does not tell",
    )
    private_links: dict[str, AnyLinkKind] = Field(
        default_factory=dict,
        description="links of the vendor's own devices: the topology tool's word → kind (NV# is NV and a number)",
    )
    checked_on: str = Field(description="where our probe of this vendor was run")
    chips: list[AcceleratorDescriptor]


def parse_descriptors(text: str) -> VendorDescriptors:
    """A vendor's ``descriptor.yaml``. Raises ValidationError naming the field of a bad one."""
    loaded = yaml.safe_load(text)
    runtime = loaded.pop("runtime_api", None)
    for chip in loaded["chips"]:
        chip["vendor"] = loaded["vendor"]
        chip.setdefault("runtime_api", runtime)
    return VendorDescriptors.model_validate(loaded)
