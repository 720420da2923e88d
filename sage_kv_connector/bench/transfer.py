# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench transfer``: ours, the machine's limit and the peers in one run, interleaved.

Each contender is a pair of processes that stays up; rounds go through all of them, so
that what else the machine does hits them alike. Figures are medians over rounds,
ratios are medians of the ratios within each round.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any, NamedTuple

from sage_kv_connector.backends import backend_class
from sage_kv_connector.bench.cipher import cipher_rows, measure_ciphers
from sage_kv_connector.bench.contender import Contender, ContenderError
from sage_kv_connector.bench.peer_libraries import missing_libraries, what_to_install
from sage_kv_connector.console import bytes_text, progress


class Peer(NamedTuple):
    """Its program, and the transport that it has on one node and across nodes."""

    program: str
    on_node: str
    across: str


#: The programs lie beside the package.
PEERS = {
    "nixl": Peer("baselines.nixl_transfer", "cma", "tcp"),
    "mooncake": Peer("baselines.mooncake_transfer", "tcp", "tcp"),
    "ib_write_bw": Peer("baselines.ib_write", "rdma", "rdma"),
}


#: What is said of bytes that were compared, or that nobody can compare.
VERIFIED = {True: "", False: ", WRONG BYTES", None: ", which nobody compared"}


def bench_transfer(
    backend: str,
    block_bytes: int,
    total_bytes: int,
    against: Sequence[str],
    repeats: int,
    security: Sequence[str] = (),
) -> dict[str, Any]:
    """Run it. A peer that can't run is in ``missing`` with the reason. Raises ContenderError if ours fails.

    ``security``: ours once more for each of these, beside the plain one.
    """
    sizes = (str(block_bytes), str(total_bytes))
    missing: dict[str, str] = {}
    crosses_nodes = backend_class(backend).capabilities.crosses_nodes
    with ExitStack() as stack:
        progress.print(
            f"{backend}: {bytes_text(total_bytes)} in shuffled blocks of {bytes_text(block_bytes)}"
        )
        ours = Contender("sage_kv_connector.bench.pair", (backend, *sizes, "none"))
        stack.callback(ours.close)
        protected: dict[str, Contender] = {}
        stack.callback(_close, protected)
        for level in security:
            protected[level] = Contender("sage_kv_connector.bench.pair", (backend, *sizes, level))
        peers: dict[str, Contender] = {}
        stack.callback(_close, peers)
        for name in against:
            if name == "limit":
                continue
            peer = PEERS[name]
            module, transport = peer.program, peer.across if crosses_nodes else peer.on_node
            try:
                peers[name] = Contender(module, (transport, *sizes))
            except ContenderError as error:
                _leave_out(name, error, missing)
        rounds = [
            _round(ours, protected, peers, missing, "limit" in against, f"round {i} of {repeats}")
            for i in range(repeats + 1)
        ][1:]  # the first warms up
        verified = {"ours": all(bool(one.ask("verify")["verified"]) for one in (ours, *protected.values()))}
        for name, contender in list(peers.items()):
            with _costs_its_own_row(name, peers, missing):
                verified[name] = contender.ask("verify")["verified"]
        return {
            "backend": backend,
            "mode": ours.about["mode"],
            "block_bytes": block_bytes,
            "total_bytes": total_bytes,
            "repeats": repeats,
            **_medians(rounds, "ours"),
            "verified": verified["ours"],
            "limit": _medians(rounds, "limit") | {"name": rounds[0]["limit"]["name"]}
            if "limit" in against
            else None,
            "ratio_to_limit": _ratio(rounds, "limit") if "limit" in against else None,
            "peers": {
                name: {
                    "version": peer.about["version"],
                    "name": peer.about["name"],
                    **_medians(rounds, name),
                    "ours_to_peer": _ratio(rounds, name),
                    "verified": verified[name],
                }
                for name, peer in peers.items()
            },
            "missing": missing,
            "security": {
                level: {**_medians(rounds, level), "to_plain": 1 / _ratio(rounds, level)}
                for level in protected
            },
            **({"cipher": measure_ciphers(protected)} if protected else {}),
        }


def transfer_rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The result as a table for people."""

    def figures(part: dict[str, Any]) -> str:
        text = f"{part['gbytes_per_s']:.2f} GB/s"
        if "small_op_us_p50" in part:
            text += f", 4 KiB: {part['small_op_us_p50']:.1f} µs (p99 {part['small_op_us_p99']:.1f})"
        if "half_rtt_us_p50" in part:
            text += f", 4 KiB half round trip: {part['half_rtt_us_p50']:.1f} µs"
        return text

    yield f"sage_kvt {result['backend']} ({result['mode']})", figures(result)
    if result["limit"] is not None:
        yield (
            f"limit: {result['limit']['name']}",
            f"{figures(result['limit'])}; ours is {result['ratio_to_limit']:.2f} of it",
        )
    for level, part in result["security"].items():
        yield f"sage_kvt {result['backend']}, {level}", f"{figures(part)}; {part['to_plain']:.2f} of plain"
    if "cipher" in result:
        yield from cipher_rows(result["cipher"])
    for peer in result["peers"].values():
        yield (
            f"{peer['name']} {peer['version']}",
            f"{figures(peer)}; ours is {peer['ours_to_peer']:.1f} × as fast" + VERIFIED[peer["verified"]],
        )
    for name, why in result["missing"].items():
        yield name, f"left out: {why}"


def _close(peers: dict[str, Contender]) -> None:
    for peer in peers.values():
        peer.close()


def _leave_out(name: str, error: ContenderError, missing: dict[str, str]) -> None:
    lacking = what_to_install(missing_libraries(name))
    missing[name] = f"{error} ({lacking})" if lacking else str(error)
    progress.print(f"{name} is left out: {missing[name]}", markup=False)


@contextmanager
def _costs_its_own_row(name: str, peers: dict[str, Contender], missing: dict[str, str]) -> Iterator[None]:
    """A peer that fails under way is left out from there; what it did before counts for nothing."""
    try:
        yield
    except ContenderError as error:
        peers.pop(name).close()
        _leave_out(name, error, missing)


def _round(
    ours: Contender,
    protected: dict[str, Contender],
    peers: dict[str, Contender],
    missing: dict[str, str],
    limit: bool,
    what: str,
) -> dict[str, dict[str, Any]]:
    begun = time.monotonic()
    out = {"ours": ours.ask("run") | ours.ask("small")}
    for level, contender in protected.items():
        out[level] = contender.ask("run") | contender.ask("small")
    if limit:
        out["limit"] = ours.ask("limit")
    for name, peer in list(peers.items()):
        with _costs_its_own_row(name, peers, missing):
            out[name] = peer.ask("run") | peer.ask("small")
    progress.print(f"  {what}: {time.monotonic() - begun:.1f} s")
    return out


def _medians(rounds: list[dict[str, dict[str, Any]]], who: str) -> dict[str, Any]:
    figures = [r[who] for r in rounds]
    return {
        key: median(f[key] for f in figures) for key, value in figures[0].items() if isinstance(value, float)
    }


def _ratio(rounds: list[dict[str, dict[str, Any]]], who: str) -> float:
    return float(median(r["ours"]["gbytes_per_s"] / r[who]["gbytes_per_s"] for r in rounds))
