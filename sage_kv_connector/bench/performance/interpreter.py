# SPDX-License-Identifier: Apache-2.0
"""Tables of what hand-overs cost Python's threads, and how many come through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sage_kv_connector.bench.goal import Found, Goal
from sage_kv_connector.bench.marked import table
from sage_kv_connector.bench.performance.table import Results, Row, two
from sage_kv_connector.console import bytes_text

SIDES = ("prefill", "decode")


def control(results: Results) -> Iterator[str]:
    """CPU milliseconds of the control threads for one hand-over; then what comes with it."""
    rows: dict[tuple[Any, ...], dict[str, Row]] = {}
    for one in results:
        for row in one["rows"]:
            key = row["mode"], row["layers"], row["tokens"], one["dim"]
            rows.setdefault(key, {})[row["backend"]] = row
    backends = list(dict.fromkeys(name for of in rows.values() for name in of))
    heads = ["", "layers × tokens", "KV a token and layer"]
    heads += [f"{side}, {name}" for name in backends for side in SIDES]
    heads += [f"a layer's end, {name}, µs" for name in backends] + ["bytes"]

    def cells(key: tuple[Any, ...], of: dict[str, Row]) -> Iterator[str]:
        mode, layers, tokens, dim = key
        yield mode
        yield f"{layers} × {tokens:,}"
        yield bytes_text(4 * dim)
        for name in backends:
            yield from (f"**{two(of[name][f'{side}_ms'])}**" for side in SIDES)
        yield from (f"{of[name]['layer_us']:.0f}" if of[name]["layer_us"] else "–" for name in backends)
        yield "equal" if all(row["right"] for row in of.values()) else "**WRONG**"

    yield from table(heads, (cells(key, of) for key, of in rows.items()))
    first = {one["backend"]: one for result in results for one in result["first_byte"]}
    yield ""
    heads = ["a page of 4 KiB is in its place at decode", *(f"{name}, µs (p99)" for name in first)]
    yield from table(heads, (_in_place(end, [*first.values()]) for end in ("layer", "step")))
    peers = [row for result in results for row in result["peers"]]
    if peers:
        yield ""
        yield from table(
            ["NIXL takes of the thread that asks it, for as many descriptors", "ms"],
            (
                [
                    f"{row['backend']}, {row['layers']} × {row['tokens']:,}",
                    row.get("why") or two(row["engine_thread_ms"]),
                ]
                for row in peers
            ),
        )


def _in_place(end: str, found: Sequence[Row]) -> list[str]:
    cells = [f"{one[f'{end}_us_p50']:.0f} ({one[f'{end}_us_p99']:.0f})" for one in found]
    return [f"after its {end}'s end", *cells]


def _control(modes: tuple[str, ...], side: str, text: str, bound: float) -> Goal:
    def found(row: Row) -> Found:
        for one in row["results"]:
            for of in one["rows"]:
                if of["mode"] in modes:
                    name = f"{of['mode']}, {of['backend']}, {of['layers']} × {of['tokens']}"
                    yield name, of[f"{side}_ms"]

    return Goal(f"control thread, ms a hand-over: {text}", found, bound, False)


def _page_in_place(row: Row) -> Found:
    for one in row["results"]:
        for of in one["first_byte"]:
            if of["backend"] == "shm":
                yield "shm", of["layer_us_p50"]


CONTROL_GOALS = (
    _control(("whole",), "prefill", "prefill, whole", 0.5),
    _control(("streamed",), "prefill", "prefill, streamed", 2.0),
    _control(("whole", "streamed"), "decode", "decode", 0.3),
    _control(("converted",), "prefill", "prefill, converted", 2.0),
    _control(("converted",), "decode", "decode, converted", 2.0),
    Goal("over shm a page is in its place after its layer's end, µs", _page_in_place, 30.0, False),
)


def beside(results: Results) -> Iterator[str]:
    """How fast a thread of Python's runs in prefill's process."""
    heads = ["streamed hand-overs", "speed of the thread beside them, of alone", "answers"]

    def row(one: Row) -> Iterator[str]:
        what = f"{one['layers']} layers × {one['tokens']:,} tokens"
        yield f"{one['a_second']:g} a second over {one['backend']}, {what}"
        yield f"**{two(one['ratio'])}**"
        yield "right" if one["right"] else "**WRONG**"

    yield from table(heads, map(row, results))


def _speed(row: Row) -> Found:
    for one in row["results"]:
        yield one["backend"], one["ratio"]


BESIDE_GOALS = (Goal("a thread beside streamed hand-overs: of its speed alone", _speed, 0.98, True),)


def rates(results: Results) -> Iterator[str]:
    """Hand-overs that arrive at a rate: latency from "all is final", and shares of one core."""
    heads = ["", "a hand-over", "asked a second", "sustained", "p50 (p99) of the first fifth, ms"]
    heads += ["of the last fifth"] + [f"{side}'s interpreter" for side in SIDES] + ["lanes, prefill, decode"]

    def rows() -> Iterator[list[str]]:
        for one in results:
            for row in one["rows"]:
                fifths = [row[f"{at}_fifth"] for at in ("first", "last")]
                yield [
                    f"{row['mode']}, {row['backend']}",
                    f"{one['layers']} × {one['tokens']:,}, pages of {bytes_text(one['page_bytes'])}",
                    f"{one['a_second']:g}",
                    "yes" if row["sustained"] and row["right"] else "**no**",
                    *(f"{two(fifth['p50_ms'])} ({fifth['p99_ms']:.1f})" for fifth in fifths),
                    *(f"**{_interpreter(row[side]):.1f} %**" for side in SIDES),
                    ", ".join(f"{row[side]['lanes']:.0f} %" for side in SIDES),
                ]

    yield from table(heads, rows())


def _interpreter(spent: Row) -> float:
    return float(spent["control"] + spent["engine"])


def _share(row: Row) -> Found:
    for one in row["results"]:
        for of in one["rows"]:
            for side in SIDES:
                yield f"{of['mode']}, {of['backend']}, {side}", _interpreter(of[side])


RATE_GOALS = (Goal("hand-overs at a rate: % of a core that the interpreter takes", _share, 20.0, False),)


def sessions(results: Results) -> Iterator[str]:
    """What open sessions hold and spend."""
    (one,) = results
    heads = ["backend", "sessions", "opened in", "idle: asking side, answering side", "of its own, a side"]
    heads += ["shared, a side", "descriptors, a side", "a question and its answer", "where there is no other"]

    def row(of: Row) -> Iterator[str]:
        sides = of["asking"], of["answering"]
        yield from (of["backend"], f"{of['sessions']:,}", f"{of['open_s']:.2f} s")
        yield ", ".join(
            f"{side['control_percent'] + side['lanes_percent']:.3f} % of a core" for side in sides
        )
        for key in ("own_bytes", "shared_bytes"):
            yield bytes_text(max(side[key] for side in sides))
        yield f"{max(side['descriptors'] for side in sides):.0f}"
        yield f"{of['ask_us'] / 1e3:.2f} ms"
        yield f"{of['ask_us_of_one'] / 1e3:.2f} ms"

    yield from table(heads, map(row, one["rows"]))
