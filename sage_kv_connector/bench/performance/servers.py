# SPDX-License-Identifier: Apache-2.0
"""Tables of what real vLLM servers were asked."""

from __future__ import annotations

from collections.abc import Iterator

from sage_kv_connector.bench.goal import Found, Goal
from sage_kv_connector.bench.marked import table
from sage_kv_connector.bench.performance.table import Results, Row, left_out, milliseconds, two

OURS, AT_ONCE = "ours", "ours, concurrent"


def hand_overs(results: Results) -> Iterator[str]:
    """Decode's time to the first token after prefill answered, by length."""
    (one,) = results
    names = [name for of in one["tokens"].values() for name in of["decode_ttft_s"]]
    others = [name for name in dict.fromkeys(names) if name not in (OURS, AT_ONCE)]
    heads = ["tokens", *(f"{name}, ms" for name in others)]
    heads += [
        "ours, after prefill, ms",
        "/ best peer",
        "ours, both at once, ms",
        "/ best peer",
        "binding",
        "token ids",
    ]

    def row(tokens: str, of: Row) -> Iterator[str]:
        yield f"{int(tokens):,}"
        yield from (milliseconds(of["decode_ttft_s"].get(name)) for name in others)
        for name in (OURS, AT_ONCE):
            yield milliseconds(of["decode_ttft_s"][name])
            yield f"**{two(of['to_best_peer'].get(name))}**"
        yield f"{of['binding']['of_ttft']:.2%}"
        yield "equal" if all(of["token_ids_equal"].values()) else "**WRONG**"

    yield from table(heads, (row(tokens, of) for tokens, of in one["tokens"].items()))
    yield from left_out(results)


def _of_best_peer(name: str, tokens: str) -> Goal:
    bound = {AT_ONCE: 0.25}.get(name) or {"2048": 0.6, "8192": 0.5, "32768": 0.35}[tokens]

    def found(row: Row) -> Found:
        for one in row["results"]:
            of = one["tokens"].get(tokens, {}).get("to_best_peer", {})
            if name in of:
                yield f"{tokens} tokens", of[name]

    text = "both at once" if name == AT_ONCE else "after prefill"
    return Goal(f"hand-over of {int(tokens):,} tokens, {text}: of the best peer", found, bound, False)


HAND_OVER_GOALS = tuple(
    _of_best_peer(name, tokens) for name in (OURS, AT_ONCE) for tokens in ("2048", "8192", "32768")
)


def routed(results: Results) -> Iterator[str]:
    """Milliseconds from prefill's answer to the first token at the client, through vLLM's router."""
    (one,) = results
    names = list(dict.fromkeys(row["contender"] for row in one["rows"]))
    rows: dict[int, dict[str, Row]] = {}
    for row in one["rows"]:
        rows.setdefault(row["tokens"], {})[row["contender"]] = row
    heads = ["tokens", *(f"{name}, ms" for name in names), "/ best of NIXL", "/ prefill first", "token ids"]

    def cells(tokens: int, of: dict[str, Row]) -> Iterator[str]:
        yield f"{tokens:,}"
        yield from (milliseconds(of[name]["after_prefill_s"]) if name in of else "–" for name in names)
        yield f"**{two(of[OURS]['to_best_peer'])}**"
        yield two(of[OURS]["to_first"])
        yield "equal" if all(row["right"] for row in of.values()) else "**WRONG**"

    yield from table(heads, (cells(tokens, of) for tokens, of in rows.items()))
    yield from left_out(results)


def _routed_to_nixl(found: Row) -> Found:
    for one in found["results"]:
        for row in one["rows"]:
            if row["tokens"] == 32768 and row["to_best_peer"] is not None:
                yield "32768 tokens, both at once", row["to_best_peer"]


ROUTED_GOALS = (Goal("through vLLM's router, 32K: of the best of NIXL", _routed_to_nixl, 0.25, False),)


def running(results: Results) -> Iterator[str]:
    """What a running request notices of hand-overs of others on its server."""
    heads = ["others", "alone, ms a token", "beside hand-overs", "beside cached requests"]
    heads += ["hand-overs / cached", "answers"]

    def row(one: Row) -> Iterator[str]:
        yield f"{one['a_second']:g} a second of {one['tokens']:,} tokens over {one['backend']}"
        for key in ("alone_ms", "handed_over_ms", "cached_ms"):
            yield f"{one[key]:.1f}"
        yield f"**{two(one['to_cached'])}**"
        yield "equal" if one["right"] else "**WRONG**"

    yield from table(heads, map(row, results))


def idle(results: Results) -> Iterator[str]:
    """CPU of servers that nothing is asked of."""
    (one,) = results
    heads = ["seconds", *(f"server, {name}" for name in one["server_cpu_s"]), "our threads, both servers"]
    cells = [f"{cpu:.2f} s" for cpu in (*one["server_cpu_s"].values(), one["connector_threads_cpu_s"])]
    yield from table(heads, [[f"{one['seconds']:.0f}", *cells]])


def unfetched(results: Results) -> Iterator[str]:
    """CPU in % of a core and a new request's time, by prefills that nobody fetches."""
    (one,) = results
    names = list(dict.fromkeys(row["contender"] for row in one["rows"]))
    rows: dict[int, dict[str, Row]] = {}
    for row in one["rows"]:
        rows.setdefault(row["unfetched"], {})[row["contender"]] = row
    heads = ["unfetched", *(text for name in names for text in (f"{name}, CPU", f"{name}, a new request"))]

    def cells(of: dict[str, Row]) -> Iterator[str]:
        for name in names:
            yield f"{of[name]['cpu_percent']:.1f} %" if name in of else "–"
            yield f"{of[name]['request_s'] * 1e3:.1f} ms" if name in of else "–"

    yield from table(heads, ([str(count), *cells(of)] for count, of in rows.items()))
    yield from left_out(results)


def _above_idle(found: Row) -> Found:
    for one in found["results"]:
        ours = [row for row in one["rows"] if row["contender"] == OURS]
        floor = next(row["cpu_percent"] for row in ours if row["unfetched"] == 0)
        for row in ours:
            if row["unfetched"]:
                yield f"{row['unfetched']} unfetched", row["cpu_percent"] - floor


UNFETCHED_GOALS = (Goal("unfetched prefills: % of a core above idle", _above_idle, 3.0, False),)


def converted_share(results: Results) -> Iterator[str]:
    """What conversion takes of a request whose attention is real."""
    (one,) = results
    heads = ["tokens", "on the wire", "prefill, s", "decode's first token, s", "conversion's threads, s"]
    heads += ["of the request"]

    def row(tokens: str, of: Row) -> Iterator[str]:
        yield f"{int(tokens):,}"
        yield f"{one['target_dtype']} over {one['backend']}"
        yield two(of["prefill_s"][OURS])
        yield two(of["decode_ttft_s"][OURS])
        yield two(of["conversion"]["thread_s"])
        yield f"**{of['conversion']['of_request']:.2%}**"

    yield from table(heads, (row(tokens, of) for tokens, of in one["tokens"].items()))


def _of_request(found: Row) -> Found:
    for one in found["results"]:
        for tokens, of in one["tokens"].items():
            yield f"{tokens} tokens", of["conversion"]["of_request"]


SHARE_GOALS = (Goal("conversion beside real attention: of the request", _of_request, 0.01, False),)
