# SPDX-License-Identifier: Apache-2.0
"""Write docs/hardware-matrix.md and the published JSON schema: ``python -m scripts.hardware_documents [--check]``.

With ``--check`` nothing is written; exit status 1 if a committed file is not what would be written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sage_kv_connector.hardware.probing.accelerator_descriptor import (
    AcceleratorDescriptor,
    Fact,
    LinkFacts,
    LinkKind,
    VendorDescriptors,
)
from sage_kv_connector.hardware.probing.profile import SCHEMA_FILE, schema
from sage_kv_connector.hardware.report.descriptors import descriptors
from sage_kv_connector.vendors import VENDORS

ROOT = Path(__file__).resolve().parent.parent
MATRIX = ROOT / "docs" / "hardware-matrix.md"
#: Links between machines; all others are inside one.
NETWORKS = {LinkKind.roce, LinkKind.infiniband, LinkKind.tcp}
SCHEMA = ROOT / "sage_kv_connector" / "hardware" / "probing" / SCHEMA_FILE


def gigabytes(fact: Fact[float] | None, what: str) -> str:
    """ "28 GB/s a pair"; empty if not known."""
    return "" if fact is None else f"{fact.value / 1e9:.4g} GB/s {what}"


def size(count: int) -> str:
    """65536 → "64 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.4g} {unit}"
        count = count // 1024 if count % 1024 == 0 else count / 1024  # type: ignore[assignment]
    raise AssertionError


class Sources:
    """Numbers the sources of one vendor's section."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, fact: Fact[Any] | None, text: str) -> str:
        """The text with the number of its source; a dash if the fact is not known."""
        if fact is None:
            return "–"
        if fact.source not in self.texts:
            self.texts.append(fact.source)
        return f"{text} [{self.texts.index(fact.source) + 1}]"


def _link(link: LinkFacts, sources: Sources) -> str:
    parts = []
    for fact, what in (
        (link.pair_bytes_per_s, "a pair"),
        (link.lane_bytes_per_s, "a lane"),
        (link.device_bytes_per_s, "a device"),
    ):
        if fact is not None:
            parts.append(sources.mark(fact, gigabytes(fact, what)))
    if link.latency_us is not None:
        parts.append(sources.mark(link.latency_us, f"{link.latency_us.value:g} µs"))
    if link.hops is not None:
        parts.append(sources.mark(link.hops, f"{link.hops.value} hop{'s' if link.hops.value > 1 else ''}"))
    if link.max_packet_bytes is not None:
        parts.append(sources.mark(link.max_packet_bytes, f"packets to {size(link.max_packet_bytes.value)}"))
    return f"{link.kind}: {', '.join(parts) or '–'}"


def _row(chip: AcceleratorDescriptor, sources: Sources) -> str:
    pages, formats = chip.page_sizes, chip.kv_formats
    cells = [
        f"**{chip.chip}**",
        ", ".join(chip.pci_devices) or "–",
        sources.mark(chip.memory_bytes, size(chip.memory_bytes.value) if chip.memory_bytes else ""),
        "<br>".join(_link(link, sources) for link in chip.links),
        sources.mark(
            chip.dma_alignment_bytes,
            f"{chip.dma_alignment_bytes.value} B" if chip.dma_alignment_bytes else "",
        ),
        sources.mark(pages, ", ".join(size(one) for one in pages.value) if pages else ""),
        sources.mark(
            chip.sram_window_bytes, size(chip.sram_window_bytes.value) if chip.sram_window_bytes else ""
        ),
        sources.mark(
            chip.max_transfer_bytes, size(chip.max_transfer_bytes.value) if chip.max_transfer_bytes else ""
        ),
        sources.mark(formats, ", ".join(formats.value) if formats else ""),
        sources.mark(
            chip.network_reads_memory, chip.network_reads_memory.value if chip.network_reads_memory else ""
        ),
    ]
    return f"| {' | '.join(cells)} |"


def _section(table: VendorDescriptors) -> list[str]:
    sources = Sources()
    runtime = table.chips[0].runtime_api
    lines = [
        f"## {table.title}",
        "",
        f"PCI vendor {table.pci_vendor}, classes {', '.join(table.pci_classes)} ({table.pci_source}). "
        f"Runtime: {runtime.value} ({runtime.source}). Tools: {', '.join(table.tools)}. Nodes: `{table.nodes}`.",
        "",
        f"Our probe was run on: {table.checked_on}.",
        "",
        f"SGLang with `sage_kvt`: `--device {'` or `'.join(table.torch_devices)}`, run on the vendor's emulator only "
        "([what can be moved](sglang.md#on-accelerators)).",
        "",
        "| chip | PCI device | memory | links, one direction | DMA alignment | pages | SRAM window | largest copy "
        "| formats | the NIC reads memory by |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_row(chip, sources) for chip in table.chips]
    lines.append("")
    lines += [f"{number}. {text}" for number, text in enumerate(sources.texts, 1)]
    remarks = [f"* {chip.chip}: {note}" for chip in table.chips for note in chip.notes]
    remarks += [f"* {chip.chip}, PCI device: {chip.pci_source}" for chip in table.chips if chip.pci_source]
    if remarks:
        lines += ["", *remarks]
    return [*lines, ""]


def _backends(tables: Sequence[VendorDescriptors]) -> list[str]:
    """Of each link: what carries KV over it, and how that was verified."""
    lines = [
        "## Which backend carries a link",
        "",
        "| link | backend | how | verified |",
        "| --- | --- | --- | --- |",
    ]
    for table in tables:
        kinds = {str(link.kind) for chip in table.chips for link in chip.links} - NETWORKS
        runtime = table.chips[0].runtime_api.value.partition(" ")[0]
        lines.append(
            f"| {table.title}: {', '.join(sorted(kinds))} | `pcie` | the receiver's device copies out of the sender's "
            f"memory, or reads it in place; both by IPC of {runtime}, which chooses the link | "
            "on the vendor's emulated device; never on a card |"
        )
    return [
        *lines,
        "| roce, infiniband | `rdma`; `nixl` or `mooncake` on request, or where rdma-core is missing "
        "| the receiver's network card reads host memory; a device's KV is staged in pinned memory "
        "| `rdma` over soft-RoCE and siw, `nixl` over UCX's tcp and cma, `mooncake` over tcp; never over a card |",
        "| tcp | `tcp` | gather and scatter on sockets | real servers on loopback and between network namespaces |",
        "| none: one machine, host memory | `shm` | the receiver reads the sender's pages | real servers |",
        "",
    ]


def matrix() -> str:
    """The text of docs/hardware-matrix.md."""
    lines = [
        "# Hardware matrix",
        "",
        "Made from `vendors/*/descriptor.yaml` by `python -m scripts.hardware_documents`; don't edit",
        'it here. Each value has its source below its table; – is not known to us. "A secondary source" means that we',
        "found no document of the vendor. `sage-kvt probe --measure` replaces a machine's values by timed ones.",
        "",
    ]
    tables = [descriptors(vendor) for vendor in VENDORS]
    lines += _backends(tables)
    for table in tables:
        lines += _section(table)
    return "\n".join(lines).rstrip() + "\n"


def schema_text() -> str:
    """The text of the published schema."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    """Write, or with ``--check`` compare."""
    stale = []
    for path, text in ((MATRIX, matrix()), (SCHEMA, schema_text())):
        if "--check" not in sys.argv[1:]:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            stale.append(str(path.relative_to(ROOT)))
    if stale:
        print(f"not current: {', '.join(stale)}; run python -m scripts.hardware_documents", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
