# SPDX-License-Identifier: Apache-2.0
"""What ``sage-kvt top`` draws of an overview. What engines and peers say is text: no markup, no control characters."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from sage_kv_connector.cli.stage_bar import LEGEND, stage_bar
from sage_kv_connector.console import bytes_text, seconds_text
from sage_kv_connector.contract.failure import printable
from sage_kv_connector.telemetry.reading.overview import Flow, LinkShown, Overview

#: From so many columns on tables lie in two columns.
WIDE = 150
UNKNOWN = "–"
#: Of a link's utilization.
BAR = 10


class TopScreen:
    """One frame. ``about``: where it was read, or what went wrong there. ``hint``: what to do without engines."""

    def __init__(self, overview: Overview, about: str, hint: str) -> None:
        self._overview = overview
        self._about = about
        self._hint = hint

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = self._overview
        yield _text(self._headline(), "bold")
        for who, why in shown.silent.items():
            yield Text(printable(f"{who} does not answer: {why}"), "yellow")
        if not shown.engines:
            yield Text(printable(self._hint))
            return
        wide = options.max_width >= WIDE
        # A screen has room for so many, a pipe for all.
        most = len(shown.transfers) if options.height is None else max(3, options.height // 4)
        yield _stacked([_engines(shown), _links(shown, wide)])
        troubles = [_failures(shown), _faults(shown)]
        times = [_latencies(shown), _stages(shown), _wire(shown)]
        last = [_transfers(shown, most), _notes(shown)]
        if not wide:
            yield _stacked([*troubles, *times, *last, _hot_chunks(shown)])
            return
        half = Table.grid(padding=(0, 2), expand=True)
        half.add_column(ratio=1)
        half.add_column(ratio=1)
        half.add_row(_stacked([*troubles, *times, _hot_chunks(shown)]), _stacked(last))
        yield half

    def _headline(self) -> str:
        shown = self._overview
        when = time.strftime("%H:%M:%S", time.localtime(shown.taken)) if shown.taken else ""
        return f"KV transport  {when}  {len(shown.engines)} engines  {self._about}"


def _text(words: object, style: str = "") -> Text:
    return Text(printable(str(words)), style, no_wrap=True, overflow="ellipsis")


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table | None:
    """Columns whose name begins with ">" stand on the right; those with "+" are cut where there is no room."""
    table = Table(title=title, title_justify="left", title_style="bold cyan", box=None, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(
            name.lstrip(">+"),
            justify="right" if name[0] == ">" else "left",
            no_wrap=name[0] != "+",
            header_style="dim",
        )
    for row in rows:
        table.add_row(*(one if isinstance(one, Text) else _text(one) for one in row))
    return table if table.row_count else None


def _stacked(tables: Iterable[RenderableType | None]) -> Group:
    return Group(*(part for table in tables if table is not None for part in (table, Text())))


def _known(value: float | None, show: Callable[[float], str]) -> str:
    return UNKNOWN if value is None else show(value)


def _per_second(count: float) -> str:
    return f"{count:.1f}"


def _rate(count: float) -> str:
    return f"{bytes_text(count)}/s"


def _who(engine: str, rank: int) -> str:
    return f"{engine}[{rank}]"


def _engines(shown: Overview) -> Table | None:
    columns = (
        "+engine",
        ">up",
        ">in/s",
        ">out/s",
        ">bad/s",
        ">landing",
        ">sending",
        ">offers",
        ">staging",
    )
    rows = []
    for one in shown.engines:
        ended, moved = one.transfers_per_second or {}, one.bytes_per_second or {}
        limit = one.staging_limit_bytes
        rows.append(
            (
                _who(one.engine, one.rank),
                seconds_text(one.up),
                _known(ended.get("decode"), _per_second),
                _known(ended.get("prefill"), _per_second),
                _known(one.failures_per_second, _per_second),
                _known(moved.get("landed"), _rate),
                _known(moved.get("sent"), _rate),
                one.offers,
                f"{bytes_text(one.staging_bytes)}{f' {one.staging_bytes / limit:.0%}' if limit else ''}",
            )
        )
    return _table("Engines", columns, rows)


def _links(shown: Overview, wide: bool) -> Table | None:
    """A line for each direction that bytes moved in."""
    columns = [
        "+of",
        "+peer",
        "way",
        "over",
        ">rate",
        "use",
        ">bytes",
        *(["security", "+how"] if wide else []),
    ]
    rows = []
    for link in shown.links:
        flows = [(word, flow) for word, flow in (("→", link.sent), ("←", link.landed)) if flow.bytes]
        for word, flow in flows or [("·", link.sent)]:
            rows.append((_who(link.engine, link.rank), link.peer, word, *_flow(link, flow, wide)))
    return _table("Links (→ sent, ← landed)", columns, rows)


def _flow(link: LinkShown, flow: Flow, wide: bool) -> list[object]:
    found: list[object] = [link.backend, _known(flow.per_second, _rate), _use(flow.utilization)]
    found.append(bytes_text(flow.bytes))
    if wide:
        how = [link.mode, link.reason, link.conversion] if link.sessions else ["no session now"]
        found += [link.security, "; ".join(word for word in how if word)]
    return found


def _use(share: float | None) -> Text:
    if share is None:
        return _text(UNKNOWN)
    full = min(BAR, round(share * BAR))
    style = "red" if share > 0.9 else "yellow" if share > 0.7 else "green"
    return Text.assemble(("━" * full, style), ("─" * (BAR - full), "dim"), f" {share:>4.0%}")


def _failures(shown: Overview) -> Table | None:
    rows = [
        (
            one.side,
            Text(printable(one.code), "red"),
            one.count,
            _known(one.per_second, _per_second),
            seconds_text(one.lost_seconds),
        )
        for one in shown.failures
    ]
    return _table("Failures (sage-kvt explain CODE)", ("side", "+code", ">count", ">a second", ">lost"), rows)


def _faults(shown: Overview) -> Table | None:
    rows = [
        (one.metric, one.of, f"{one.count:.0f}", _known(one.per_second, _per_second)) for one in shown.faults
    ]
    return _table("What should not be seen", ("counted", "+of", ">count", ">a second"), rows)


def _wire(shown: Overview) -> Table | None:
    rows = [
        (
            one.side,
            one.wire_dtype,
            _use(one.share),
            bytes_text(one.bytes),
            _known(one.compression, lambda ratio: f"{ratio:.2f}"),
        )
        for one in shown.wire
    ]
    return _table("Dtypes on the wire", ("side", "dtype", "share", ">bytes", ">compression"), rows)


def _latencies(shown: Overview) -> Table | None:
    columns = ("+side", "over", ">count", ">p50", ">p90", ">p99", ">now", ">p50 now", ">p99 now")
    rows = [
        (
            one.side,
            one.backend,
            one.count,
            *(_known(time, seconds_text) for time in (one.p50, one.p90, one.p99)),
            one.late_count,
            *(_known(time, seconds_text) for time in (one.late_p50, one.late_p99)),
        )
        for one in shown.latencies
    ]
    return _table("Transfers that ended well", columns, rows)


def _stages(shown: Overview) -> Table | None:
    rows = [
        (one.side, one.stage, _use(one.share), seconds_text(one.seconds), _known(one.p99, seconds_text))
        for one in shown.stages
    ]
    return _table("Stages' shares of the time", ("side", "+stage", "share", ">sum", ">p99"), rows)


def _transfers(shown: Overview, most: int) -> Table | None:
    columns = ("+transfer", "side", "+peer", ">bytes", ">time", "stages", "+end")
    rows = []
    for shown_one in shown.transfers[:most]:
        one = shown_one.record
        rows.append(
            (
                one.transfer_id,
                one.side,
                one.peer,
                bytes_text(one.nbytes),
                seconds_text(one.seconds),
                stage_bar(one.stages),
                Text(printable(one.code), "green" if one.code == "ok" else "red"),
            )
        )
    return _table(f"Last transfers: {LEGEND}", columns, rows)


def _notes(shown: Overview) -> Table | None:
    rows = [
        (
            time.strftime("%H:%M:%S", time.localtime(one.note.at)),
            one.note.code,
            Text(printable(one.note.text)),
        )
        for one in shown.notes
    ]
    return _table("Notes", ("when", "+code", "+what"), rows)


def _hot_chunks(shown: Overview) -> Table | None:
    rows = [(one.digest, one.tokens, one.handovers) for one in shown.hot_chunks]
    return _table("Hot chunks of prompts", ("+digest", ">tokens", ">hand-overs"), rows)
