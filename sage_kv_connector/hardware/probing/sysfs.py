# SPDX-License-Identifier: Apache-2.0
"""What the kernel tells: PCI functions, NUMA nodes, RDMA devices, network interfaces, WSL2.

Formats: Documentation/ABI/testing/sysfs-bus-pci, sysfs-class-net and sysfs-class-infiniband in
the Linux sources.
"""

from __future__ import annotations

import posixpath
import re
from typing import NamedTuple

from sage_kv_connector.hardware.probing.accelerator_descriptor import Fact
from sage_kv_connector.hardware.probing.machine import Machine
from sage_kv_connector.hardware.probing.profile import Interface, NumaNode, PciLink, Platform, RdmaDevice

PCI = "/sys/bus/pci/devices"
NODES = "/sys/devices/system/node"
INFINIBAND = "/sys/class/infiniband"
NET = "/sys/class/net"

#: InfiniBand payload sizes, and what RoCE's headers take of an Ethernet frame: GRH 40, UDP 8,
#: BTH 12, XRC 4, atomic 28, ICRC 4 (iboe_get_mtu in the kernel's include/rdma/ib_addr.h).
_IB_PAYLOADS = (4096, 2048, 1024, 512, 256)
_ROCE_HEADERS = 96


class PciFunction(NamedTuple):
    """A PCI function as sysfs shows it."""

    address: str
    vendor: str  #: four hex digits
    device: str  #: four hex digits
    pci_class: str  #: first four hex digits
    numa_node: int | None  #: None where sysfs says -1
    link: PciLink


def pci_functions(machine: Machine) -> list[PciFunction]:
    """All functions with a readable vendor id, in order of their addresses."""
    found = []
    for address in machine.names(PCI):
        at = posixpath.join(PCI, address)
        vendor, device = machine.read(f"{at}/vendor"), machine.read(f"{at}/device")
        if vendor is None or device is None:
            continue
        code = (machine.read(f"{at}/class") or "").removeprefix("0x").zfill(6)
        found.append(
            PciFunction(
                address.lower(),
                vendor.removeprefix("0x").lower(),
                device.removeprefix("0x").lower(),
                code[:4].lower(),
                _node_of(machine, at),
                PciLink(
                    speed_gt_s=_speed(machine.read(f"{at}/current_link_speed")),
                    width=_width(machine.read(f"{at}/current_link_width")),
                    max_speed_gt_s=_speed(machine.read(f"{at}/max_link_speed")),
                    max_width=_width(machine.read(f"{at}/max_link_width")),
                ),
            )
        )
    return found


def _node_of(machine: Machine, path: str) -> int | None:
    node = _int(machine.read(f"{path}/numa_node"))
    return node if node is not None and node >= 0 else None


def _speed(text: str | None) -> float | None:
    """ "16.0 GT/s PCIe" and "8 GT/s" (older kernels) → GT/s; "Unknown" → None."""
    found = re.match(r"([0-9.]+) GT/s", text or "", re.ASCII)
    return float(found.group(1)) if found else None


def _width(text: str | None) -> int | None:
    """0 and 255 are what the kernel prints for "unknown"."""
    width = _int(text)
    return width if width is not None and 0 < width <= 32 else None


def _int(text: str | None) -> int | None:
    try:
        return int(text or "")
    except ValueError:
        return None


def pcie_bytes_per_s(speed_gt_s: float, width: int) -> float:
    """One direction, after line coding and before packet headers.

    PCI Express: 8b/10b at 2.5 and 5 GT/s, 128b/130b at 8 to 32 GT/s, 242 of 256 bytes of a flit at 64 GT/s.
    """
    coding = 0.8 if speed_gt_s <= 5 else 128 / 130 if speed_gt_s <= 32 else 242 / 256
    return speed_gt_s * 1e9 * coding * width / 8


def platform(machine: Machine) -> Platform:
    """The host."""
    kernel = machine.read("/proc/sys/kernel/osrelease") or ""
    nodes = []
    for name in machine.names(NODES):
        if number := re.fullmatch(r"node(\d+)", name):
            cpus = machine.read(f"{NODES}/{name}/cpulist") or ""
            nodes.append(NumaNode(id=int(number.group(1)), cpus=cpus))
    nodes.sort(key=lambda node: node.id)
    online = machine.read("/sys/devices/system/cpu/online") or ""
    return Platform(
        kernel=kernel,
        # Microsoft's WSL2 kernels are named "…-microsoft-standard-WSL2"; /dev/dxg is their GPU
        # channel. WSL1's release says "Microsoft" and has neither.
        wsl2="wsl2" in kernel.lower() or "dxg" in machine.names("/dev"),
        cpus=len(cpu_set(online)),
        numa_nodes=nodes,
    )


def cpu_set(text: str) -> set[int]:
    """ "0-3,8" → {0, 1, 2, 3, 8}; parts that are not numbers are left out."""
    found: set[int] = set()
    for part in text.split(","):
        if span := re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part, re.ASCII):
            first = int(span.group(1))
            last = int(span.group(2) or first)
            if first <= last < 1 << 20:
                found.update(range(first, last + 1))
    return found


def node_of_cpus(cpus: str, nodes: list[NumaNode]) -> int | None:
    """The node whose CPUs hold all of ``cpus``; None if there is no single one."""
    wanted = cpu_set(cpus)
    holding = [node.id for node in nodes if wanted and wanted <= cpu_set(node.cpus)]
    return holding[0] if len(holding) == 1 else None


def rdma_devices(machine: Machine) -> list[RdmaDevice]:
    """Every port of every RDMA device."""
    found = []
    for name in machine.names(INFINIBAND):
        at = f"{INFINIBAND}/{name}"
        # Only soft-RoCE (rdma_rxe) has the file "parent"; its rate is a constant of the driver.
        parent = machine.read(f"{at}/parent")
        for port in machine.names(f"{at}/ports"):
            layer = machine.read(f"{at}/ports/{port}/link_layer") or ""
            roce = layer == "Ethernet"
            interface = _carrier(machine, at, port) or parent
            rate = _rate(machine, f"{at}/ports/{port}/rate") if parent is None else None
            found.append(
                RdmaDevice(
                    name=name,
                    port=_int(port) or 0,
                    layer="roce" if roce else "infiniband",
                    active="ACTIVE" in (machine.read(f"{at}/ports/{port}/state") or ""),
                    bytes_per_s=rate,
                    max_packet_bytes=_roce_payload(machine, interface) if roce and interface else None,
                    pci_address=_pci_of(machine, f"{at}/device"),
                    numa_node=_node_of(machine, f"{at}/device"),
                    interface=interface,
                    software=parent is not None,
                )
            )
    return found


def _carrier(machine: Machine, device: str, port: str) -> str | None:
    """The interface of the port's first GID (the bond, where there is one), else of the same function."""
    named = machine.read(f"{device}/ports/{port}/gid_attrs/ndevs/0")
    return named or next(iter(machine.names(f"{device}/device/net")), None)


def _rate(machine: Machine, path: str) -> Fact[float] | None:
    """ "200 Gb/sec (4X HDR)" → bytes a second."""
    found = re.match(r"([0-9.]+) Gb/sec", machine.read(path) or "", re.ASCII)
    return Fact[float](value=float(found.group(1)) * 1e9 / 8, source=path) if found else None


def _roce_payload(machine: Machine, interface: str) -> Fact[int] | None:
    mtu = _int(machine.read(f"{NET}/{interface}/mtu"))
    fitting = next((size for size in _IB_PAYLOADS if mtu is not None and size <= mtu - _ROCE_HEADERS), None)
    if fitting is None:
        return None
    return Fact[int](
        value=fitting, source=f"mtu {mtu} of {interface}, less {_ROCE_HEADERS} of RoCE's headers"
    )


def interfaces(machine: Machine) -> list[Interface]:
    """Network interfaces with hardware below them, or a speed of their own (bonds)."""
    found = []
    for name in machine.names(NET):
        at = f"{NET}/{name}"
        address = _pci_of(machine, f"{at}/device")
        speed = _int(machine.read(f"{at}/speed"))
        known = speed is not None and speed > 0
        behind = machine.names(f"{at}/device") or address is not None
        if name == "lo" or not (behind or known) or re.match(r"(veth|docker|br-|virbr|tap|tun)", name):
            continue
        found.append(
            Interface(
                name=name,
                up=machine.read(f"{at}/operstate") == "up" or machine.read(f"{at}/carrier") == "1",
                bytes_per_s=Fact[float](value=(speed or 0) * 1e6 / 8, source=f"{at}/speed")
                if known
                else None,
                mtu=_int(machine.read(f"{at}/mtu")),
                pci_address=address,
                numa_node=_node_of(machine, f"{at}/device"),
            )
        )
    return found


def _pci_of(machine: Machine, device: str) -> str | None:
    """The PCI address at the end of a ``device`` link, if that is a PCI function."""
    name = posixpath.basename(machine.target(device) or "")
    return (
        name.lower() if re.fullmatch(r"[0-9a-fA-F]{4}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-7]", name) else None
    )
