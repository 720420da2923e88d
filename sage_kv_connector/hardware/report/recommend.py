# SPDX-License-Identifier: Apache-2.0
"""From a profile to options: which preset, which backend, and why."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from sage_kv_connector.backends import backend_names
from sage_kv_connector.config import KVTransportConfig, presets
from sage_kv_connector.hardware.probing.accelerator_descriptor import LinkKind
from sage_kv_connector.hardware.probing.profile import HardwareProfile, Link, Recommendation
from sage_kv_connector.hardware.report.descriptors import private_links

#: Bytes a second. From 25 Gbit/s on one lane does not fill the link; below 10 Gbit/s the wire is
#: the limit even for a short prompt (docs/performance.md).
FAST_NETWORK = 25e9 / 8
SLOW_NETWORK = 10e9 / 8


def recommend(
    profile: HardwareProfile,
    available: Collection[str] | None = None,
    lacking: Mapping[str, str] = MappingProxyType({}),
) -> Recommendation:
    """Options that this release accepts. ``available`` are the backends it has, all that are here if None; ``lacking``:
    those that the machine can't have, and why.

    What the hardware would be best used with, but can't be, is said in the reasons.
    """
    reasons: list[str] = []
    available = set(backend_names() if available is None else available) - set(lacking)
    wanted = _backends(profile, reasons)
    backend = next(name for name in wanted if name == "auto" or name in available)
    for missing in wanted[: wanted.index(backend)]:
        why = lacking.get(missing) or "it is not part of this release"
        reasons.append(f"{missing} can't be used here, {why}: {backend} is the next best")
    preset = _preset(profile, reasons)
    config: dict[str, Any] = {"preset": preset, "backend": backend}
    if backend == "rdma":
        config["backend"] = "auto"
        reasons.append("auto takes rdma across nodes, and what is nearer on a node")
    settings = presets()[preset]["settings"]
    if settings.get("overlap_streams", 0) > 1 and 0 < profile.platform.cpus <= 4:
        config["overlap_streams"] = 1
        reasons.append(f"{profile.platform.cpus} cores: one lane, so that the engine keeps the others")
    reasons.append(f"{preset}: {presets()[preset]['goal']}")
    KVTransportConfig.load({**config, "backend": "auto"} if backend not in backend_names() else config)
    return Recommendation(
        preset=preset, backend=backend, would_choose=wanted[0], config=config, reasons=reasons
    )


def _networks(profile: HardwareProfile) -> list[Link]:
    """RDMA to other nodes: not down, and a NIC's own."""
    software = {port.name for port in profile.rdma if port.software}
    return [
        link
        for link in profile.links
        if link.b == "network"
        and link.kind in (LinkKind.roce, LinkKind.infiniband)
        and link.up is not False
        and link.a not in software
    ]


def _backends(profile: HardwareProfile, reasons: list[str]) -> list[str]:
    """Backends from the best on; the last is always in the release."""
    devices, private_kinds = profile.devices, set(private_links().values())
    if profile.platform.wsl2:
        if devices:
            reasons.append(
                "WSL2: no RDMA and no links between devices reach the guest, so through the host (pcie)"
            )
            return ["pcie", "tcp"]
        reasons.append("WSL2 without an accelerator: tcp works through its virtual network")
        return ["tcp"]
    ports = _networks(profile)
    if ports:
        names = ", ".join(sorted({f"{port.kind} {port.a}" for port in ports})[:4])
        more = f" and {len(ports) - 4} more" if len(ports) > 4 else ""
        reasons.append(f"RDMA across nodes: {names}{more}")
        return ["rdma", "pcie", "auto"] if devices else ["rdma", "auto"]
    if soft := [port.name for port in profile.rdma if port.software]:
        reasons.append(f"{', '.join(soft)} is soft-RoCE, which tcp outruns: not counted as RDMA")
    if devices:
        private = sorted({str(link.kind) for link in profile.links if link.kind in private_kinds})
        if private:
            reasons.append(f"devices linked by {', '.join(private)}, no RDMA: the vendor's copies (pcie)")
        else:
            reasons.append("PCIe only, no other link was found: copies through pinned host memory (pcie)")
        return ["pcie", "auto"]
    reasons.append("no accelerator and no RDMA: host memory, by shm on a node and by tcp across nodes")
    return ["auto"]


def _preset(profile: HardwareProfile, reasons: list[str]) -> str:
    software = {port.name for port in profile.rdma if port.software}
    outward = [
        link
        for link in profile.links
        if link.b == "network" and link.up is not False and link.bytes_per_s and link.a not in software
    ]
    fastest = max(outward, key=lambda link: link.bytes_per_s.value if link.bytes_per_s else 0, default=None)
    private_kinds = set(private_links().values())
    private = any(link.kind in private_kinds for link in profile.links)
    if fastest is None or fastest.bytes_per_s is None:
        reasons.append("no network's speed is known")
        return "high-bw" if private else "low-latency"
    speed = fastest.bytes_per_s.value
    said = f"the fastest network is {fastest.a} ({fastest.kind}) with {speed * 8 / 1e9:g} Gbit/s"
    reasons.append(said)
    if speed >= FAST_NETWORK or private:
        return "high-bw"
    if speed < SLOW_NETWORK:
        reasons.append(
            "below 10 Gbit/s: fp8 on the wire, which costs some accuracy (`sage-kvt presets explain wan`); "
            "for two servers on this node take low-latency"
        )
        return "wan"
    return "low-latency"
