# SPDX-License-Identifier: Apache-2.0
"""Tables of what moves and converts bytes without an engine."""

from __future__ import annotations

from collections.abc import Iterator

from sage_kv_connector.bench.goal import Found, Goal
from sage_kv_connector.bench.marked import table
from sage_kv_connector.bench.performance.table import Results, Row, left_out, two
from sage_kv_connector.console import bytes_text

PEERS = {"nixl": "NIXL", "mooncake": "Mooncake"}


def transfers(results: Results) -> Iterator[str]:
    """Shuffled blocks between two processes, by backend and block."""
    heads = ["backend", "block", "ours, GB/s", "limit, GB/s", "ours / limit"]
    heads += [text for name in PEERS.values() for text in (f"{name}, GB/s", f"ours / {name}")]
    heads += ["one 4 KiB op of ours, µs (p99)", "bytes"]

    def row(one: Row) -> Iterator[str]:
        yield f"{one['backend']} ({one['mode']})"
        yield bytes_text(one["block_bytes"])
        yield two(one["gbytes_per_s"])
        yield f"{two(one['limit']['gbytes_per_s'])} ({one['limit']['name']})"
        yield f"**{two(one['ratio_to_limit'])}**"
        for name in PEERS:
            peer = one["peers"].get(name)
            yield f"{two(peer['gbytes_per_s'])} ({peer['name']})" if peer else "–"
            yield f"{peer['ours_to_peer']:.1f}" if peer else "–"
        yield f"{one['small_op_us_p50']:.1f} ({one['small_op_us_p99']:.0f})"
        yield "equal" if one["verified"] else "**WRONG**"

    yield from table(heads, map(row, results))
    yield from left_out(results)


def _transfer_name(one: Row) -> str:
    return f"{one['backend']}, {bytes_text(one['block_bytes'])}"


def _to_limit(found: Row) -> Found:
    for one in found["results"]:
        yield _transfer_name(one), one["ratio_to_limit"]


def _to_nixl(found: Row) -> Found:
    for one in found["results"]:
        if "nixl" in one["peers"] and one["backend"] == "tcp":
            yield _transfer_name(one), one["peers"]["nixl"]["ours_to_peer"]


def _small_to_nixl(found: Row) -> Found:
    for one in found["results"]:
        if "nixl" in one["peers"] and (one["backend"], one["block_bytes"]) == ("shm", 4096):
            yield _transfer_name(one), one["peers"]["nixl"]["ours_to_peer"]


TRANSFER_GOALS = (
    Goal("shuffled blocks: ours over the limit", _to_limit, 0.9, True),
    Goal("shuffled blocks of 4 KiB over shm: ours over NIXL's cma", _small_to_nixl, 4.0, True),
    Goal("shuffled blocks over tcp: ours over NIXL's tcp", _to_nixl, 3.0, True),
)


def conversions(results: Results) -> Iterator[str]:
    """One thread, paged bf16: by direction and format, one column pair a layout."""
    heads = [""]
    for one in results:
        heads += [f"{one['layout']} ({one['kernels']}), GB/s", "of a copy"]
    heads += ["of torch, eager", "of torch.compile", "bits"]

    def row(name: str) -> Iterator[str]:
        yield name
        for one in results:
            figures = one["results"][name]
            yield two(figures["gbytes_per_s_of_source"])
            yield f"**{two(figures['ratio_to_copy'])}**"
        first = results[0]["results"][name]
        for key in ("torch_eager_ratio", "torch_compile_ratio"):
            yield f"{first[key]:.1f}" if first[key] else "–"
        yield "equal" if all(one["results"][name]["bit_identical"] for one in results) else "**WRONG**"

    yield from table(heads, map(row, results[0]["results"]))


def _of_a_copy(found: Row) -> Found:
    for one in found["results"]:
        for name, figures in one["results"].items():
            yield f"{name}, {one['layout']}", figures["ratio_to_copy"]


CONVERSION_GOALS = (Goal("conversion: of a copy of the same pages", _of_a_copy, 0.6, True),)


def stores(results: Results) -> Iterator[str]:
    """Batches of pages into a store and back."""
    backends = [name for name, of in results[0].items() if isinstance(of, dict)]
    heads = ["pages", "plain copy, GB/s"]
    heads += [f"{verb}, {name}, GB/s (of the copy)" for name in backends for verb in ("put", "get")]

    def row(one: Row) -> Iterator[str]:
        yield f"{one['pages']:,} of {bytes_text(one['page_bytes'])}"
        yield two(one["memcpy_gbytes_per_s"])
        for name in backends:
            for verb in ("put", "get"):
                yield f"{two(one[name][f'{verb}_gbytes_per_s'])} ({two(one[name][f'{verb}_to_memcpy'])})"

    yield from table(heads, map(row, results))


def links(results: Results) -> Iterator[str]:
    """A hand-over across a limited link, by rate and dtype on the wire."""
    heads = ["link", "on the wire", "bytes", "time", "utilization", "a plain socket, as many bytes"]

    def rows() -> Iterator[list[str]]:
        for one in results:
            for dtype, of in one["results"].items():
                yield [
                    f"{one['gbit_per_s']:g} Gb/s",
                    dtype,
                    f"{of['wire_bytes'] / 1e6:.0f} MB",
                    f"{of['seconds']:.2f} s",
                    f"**{of['utilization']:.3f}**",
                    f"{of['plain_socket_utilization']:.3f}",
                ]

    yield from table(heads, rows())


def _link_use(found: Row) -> Found:
    for one in found["results"]:
        for dtype, of in one["results"].items():
            yield f"{one['gbit_per_s']:g} Gb/s, {dtype}", of["ratio_to_plain_socket"]


LINK_GOALS = (Goal("a limited link: time of a plain socket over ours", _link_use, 0.95, True),)


def counting(results: Results) -> Iterator[str]:
    """What telemetry adds to the time, by what is moved and backend."""
    rows: dict[str, dict[str, Row]] = {}
    for one in results:
        for row in one["rows"]:
            what = (
                f"{bytes_text(row['bytes'])} in blocks of {bytes_text(row['block_bytes'])}"
                if row["what"] == "transfer"
                else f"{row['what']}, {row['tokens']:,} tokens"
            )
            rows.setdefault(what, {})[row["backend"]] = row
    backends = list(dict.fromkeys(name for of in rows.values() for name in of))

    def cell(row: Row | None) -> str:
        if row is None:
            return "–"
        low, high = row["interval"]
        return f"{row['overhead']:+.1%} ({low:+.1%} to {high:+.1%})"

    yield from table(
        ["what", *backends], ([what, *(cell(of.get(name)) for name in backends)] for what, of in rows.items())
    )


def _overhead(found: Row) -> Found:
    for one in found["results"]:
        for row in one["rows"]:
            size = bytes_text(row["block_bytes"]) if row["what"] == "transfer" else f"{row['tokens']} tokens"
            yield f"{row['backend']}, {row['what']}, {size}", row["overhead"]


COUNTING_GOALS = (Goal("telemetry: of the time without", _overhead, 0.01, False),)
