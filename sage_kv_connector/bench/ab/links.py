# SPDX-License-Identifier: Apache-2.0
"""What lies between prefill and decode: one node, or two hosts and a link whose rate is limited.

A host is a network namespace. The link is a veth pair with ``tc … tbf`` from prefill to decode; a second pair
without a limit leads from here to each host, for requests. Needs root, iproute2 and, to measure, iperf3.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

#: Name → Mb/s from prefill to decode.
LINKS: dict[str, float | None] = {"node": None, "10g": 10_000, "1g": 1_000, "100m": 100}
#: The link's device at both hosts; of more than one, a number follows from the second on.
DEVICE = "kvlink"
#: How the names of a run's namespaces and devices begin; its process id follows.
TAG = "kvab"
PREFILL, DECODE = "10.231.77.1", "10.231.77.2"
#: Networks of further links.
FURTHER = "10.231.{}.{}"
IPERF_S = 3


class LinkError(RuntimeError):
    """It can't be made or measured here; the message says what is missing."""


class Host(NamedTuple):
    """``enter``: the words before a command that run it there."""

    address: str
    namespace: str

    @property
    def enter(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.namespace)


class Hosts(NamedTuple):
    prefill: Host
    decode: Host

    def sent_bytes(self) -> int:
        """From prefill to decode over the link so far, headers included."""
        shown = _run("ip", "-n", self.prefill.namespace, "-s", "-j", "link", "show", "dev", DEVICE)
        return int(json.loads(shown)[0]["stats64"]["tx"]["bytes"])


class Measured(NamedTuple):
    """What one plain TCP stream got: of its payload, and of bytes on the link, a second."""

    payload_bytes_s: float
    link_bytes_s: float


@contextlib.contextmanager
def two_hosts(mbit: float, links: int = 1) -> Iterator[Hosts]:
    """Each of the links has this rate, and a network of its own (``device``, ``address``).

    Raises LinkError where namespaces can't be made. What a run left that was killed is removed first.
    """
    for left in left_over(_quiet("ip", "netns", "list")):
        _remove(left)
    tag = f"{TAG}{os.getpid()}"
    hosts = Hosts(Host(PREFILL, f"{tag}p"), Host(DECODE, f"{tag}d"))
    try:
        for host in hosts:
            _run("ip", "netns", "add", host.namespace)
            _run("ip", "-n", host.namespace, "link", "set", "lo", "up")
        for link in range(links):
            _connect(hosts, link, mbit)
        for number, host in enumerate(hosts):
            _reach(host, f"{tag}{number}", f"10.231.{78 + number}")
        yield hosts
    finally:
        _remove(tag)


def device(link: int) -> str:
    """Of a link, at both hosts."""
    return f"{DEVICE}{link or ''}"


def address(host: Host, link: int) -> str:
    """A host's, on a link."""
    return FURTHER.format(90 + link, host.address.rpartition(".")[2]) if link else host.address


def _connect(hosts: Hosts, link: int, mbit: float) -> None:
    one, other = hosts
    name = device(link)
    _run(
        "ip",
        "link",
        "add",
        name,
        "netns",
        one.namespace,
        "type",
        "veth",
        "peer",
        name,
        "netns",
        other.namespace,
    )
    for host in hosts:
        _run("ip", "-n", host.namespace, "addr", "add", f"{address(host, link)}/24", "dev", name)
        _run("ip", "-n", host.namespace, "link", "set", name, "up")
    burst = max(1 << 20, int(mbit * 1e6 / 8 / 100))  # what 10 ms carry, for kernels with a slow tick
    _run(
        "tc", "-n", one.namespace, "qdisc", "add", "dev", name, "root", "tbf",
        "rate", f"{int(mbit)}mbit", "burst", str(burst), "latency", "50ms",
    )  # fmt: skip


def left_over(namespaces: str) -> set[str]:
    """Tags of runs that are no more, in what ``ip netns list`` shows."""
    tags = re.findall(rf"^({TAG}(\d+))[pd]\b", namespaces, re.MULTILINE)
    return {tag for tag, pid in tags if not Path(f"/proc/{pid}").exists()}


def _remove(tag: str) -> None:
    """The namespaces, what runs in them, and the devices that lead there, at once: addresses are the same each time."""
    for number, namespace in enumerate((f"{tag}p", f"{tag}d")):
        for pid in _quiet("ip", "netns", "pids", namespace).split():
            _quiet("kill", "-9", pid)
        _quiet("ip", "link", "del", f"{tag}{number}")
        _quiet("ip", "netns", "del", namespace)


@contextlib.contextmanager
def linked(name: str) -> Iterator[Hosts | None]:
    """The two hosts of a link of ``LINKS``; none on one node. Raises LinkError."""
    mbit = LINKS[name]
    with two_hosts(mbit) if mbit else contextlib.nullcontext() as hosts:
        yield hosts


def _reach(host: Host, device: str, net: str) -> None:
    """From here, past the link, at the address that the host has on it."""
    _run("ip", "link", "add", device, "type", "veth", "peer", "here", "netns", host.namespace)
    _run("ip", "addr", "add", f"{net}.1/24", "dev", device)
    _run("ip", "link", "set", device, "up")
    _run("ip", "-n", host.namespace, "addr", "add", f"{net}.2/24", "dev", "here")
    _run("ip", "-n", host.namespace, "link", "set", "here", "up")
    _run("ip", "route", "add", f"{host.address}/32", "via", f"{net}.2")


def iperf(hosts: Hosts) -> Measured:
    """One stream from prefill to decode, in this run. Raises LinkError without iperf3."""
    if shutil.which("iperf3") is None:
        raise LinkError("iperf3 is not installed: the link's rate can't be measured (apt-get install iperf3)")
    server = subprocess.Popen([*hosts.decode.enter, "iperf3", "-s", "-1"], stdout=subprocess.DEVNULL)
    try:
        time.sleep(0.5)
        before = hosts.sent_bytes()
        command = [*hosts.prefill.enter, "iperf3", "-c", hosts.decode.address, "-t", str(IPERF_S), "-J"]
        done: dict[str, Any] = json.loads(_run(*command))
        received, sent = done["end"]["sum_received"], hosts.sent_bytes() - before
        payload = received["bits_per_second"] / 8
        return Measured(payload, payload * sent / received["bytes"])
    finally:
        server.kill()
        server.wait()


def _run(*words: str) -> str:
    try:
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError as error:
        raise LinkError(f"{words[0]} is not installed (apt-get install iproute2)") from error
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).strip()
        raise LinkError(f"{' '.join(words)}: {said}; links between hosts want root") from error


def _quiet(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True).stdout
