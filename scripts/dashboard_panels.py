# SPDX-License-Identifier: Apache-2.0
"""What the Grafana dashboard asks and shows, in rows; ``grafana_dashboard`` writes it as Grafana reads it.

Expressions have our metrics as ``<<metric>>`` or ``<<metric, label="value">>``.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Query(NamedTuple):
    """``legend``: with ``{{label}}``, as Grafana's; none where a panel has one series or is a table."""

    expression: str
    legend: str = ""


class Panel(NamedTuple):
    """``kind``: Grafana's; ``instant`` queries ask for now, others for the time shown."""

    title: str
    kind: str
    unit: str
    width: int
    height: int
    queries: tuple[Query, ...]
    text: str = ""
    instant: bool = False
    stacked: bool = False
    options: dict[str, Any] = {}  # noqa: RUF012 - a default that nobody changes


RATE = "[$__rate_interval]"
LINK = "engine, rank, peer, backend"
MOVED = f"sum by ({LINK}, direction) (rate(<<link_bytes_total>>{RATE}))"
CAPACITY = (
    f'(max by ({LINK}) (<<link_capacity_bytes_per_second, source="nic">>)'
    f' or max by ({LINK}) (<<link_capacity_bytes_per_second, source="best">>))'
)
UTILIZATION = f"max by ({LINK}) ({MOVED}) / on ({LINK}) {CAPACITY}"
CONVERTED = f"sum(rate(<<conversion_seconds_total>>{RATE}))"
LANES = f"sum(rate(<<lane_seconds_total>>{RATE}))"
LINK_NAME = "{{engine}}[{{rank}}] ⇄ {{peer}} · {{backend}}"
FAULTS = (
    "checksum_failures_total",
    "forged_frames_total",
    "refused_chunks_total",
    "stale_chunks_total",
)


def quantile(share: float) -> Query:
    of = f"sum by (side, le) (rate(<<transfer_seconds_bucket>>{RATE}))"
    return Query(f"histogram_quantile({share}, {of})", f"{{{{side}}}} p{share * 100:g}")


def stat(title: str, unit: str, expression: str, text: str = "") -> Panel:
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "graphMode": "area",
    }
    return Panel(title, "stat", unit, 4, 4, (Query(expression),), text, options=options)


def lines(
    title: str, unit: str, *queries: Query, width: int = 12, text: str = "", stacked: bool = False
) -> Panel:
    options = {
        "legend": {
            "displayMode": "table",
            "placement": "bottom",
            "showLegend": True,
            "calcs": ["lastNotNull", "max"],
        },
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return Panel(title, "timeseries", unit, width, 9, queries, text, stacked=stacked, options=options)


def table(title: str, unit: str, *queries: Query, width: int = 12, text: str = "") -> Panel:
    return Panel(title, "table", unit, width, 9, queries, text, instant=True, options={"showHeader": True})


ROWS: dict[str, tuple[Panel, ...]] = {
    "KV Transport": (
        stat("Sent", "binBps", f'sum(rate(<<link_bytes_total, direction="sent">>{RATE}))'),
        stat("Received", "binBps", f'sum(rate(<<link_bytes_total, direction="landed">>{RATE}))'),
        stat("Busiest link", "percentunit", f"max({UTILIZATION})", "Of what the link can carry."),
        stat(
            "Failed transfers",
            "percentunit",
            f'(sum(rate(<<transfers_total, code!="ok">>{RATE})) or vector(0)) / sum(rate(<<transfers_total>>{RATE}))',
        ),
        stat(
            "Conversion share",
            "percentunit",
            f"{CONVERTED} / ({CONVERTED} + {LANES})",
            "Of the time that lanes and conversion threads worked.",
        ),
        stat(
            "Compression",
            "suffix: ×",
            'sum(<<kv_bytes_total, side="decode">>) / sum(<<transferred_bytes_total, side="decode">>)',
            "Bytes in the caches over bytes on the wire.",
        ),
    ),
    "Links": (
        lines("Throughput by link", "binBps", Query(MOVED, f"{LINK_NAME} {{{{direction}}}}")),
        lines(
            "Utilization by link", "percentunit", Query(UTILIZATION, LINK_NAME), text="The larger direction."
        ),
        lines("Duration of transfers", "s", quantile(0.5), quantile(0.99)),
        lines(
            "Transfers and failures by link",
            "ops",
            Query(f"sum by ({LINK}, code) (rate(<<transfers_total>>{RATE}))", f"{LINK_NAME} {{{{code}}}}"),
        ),
    ),
    "Failures and alerts": (
        table(
            "Failures by code",
            "short",
            Query('sum by (side, code) (increase(<<transfers_total, code!="ok">>[$__range])) > 0'),
            text="sage-kvt explain CODE says what causes it and what to do.",
        ),
        lines(
            "Lost to failures",
            "short",
            Query(f"sum by (code) (rate(<<lost_seconds_total>>{RATE}))", "{{code}}: seconds a second"),
            Query(
                f"sum by (code) (rate(<<recomputed_tokens_total>>{RATE}))",
                "{{code}}: tokens a second, again",
            ),
        ),
        lines(
            "Alerts",
            "short",
            *(
                Query(f"sum by (backend) (increase(<<{name}>>{RATE}))", f"{name} {{{{backend}}}}")
                for name in FAULTS
            ),
            Query(f"sum by (code) (increase(<<refused_peers_total>>{RATE}))", "refused_peers_total {{code}}"),
            Query(f'sum by (code) (increase(<<dials_total, code!="ok">>{RATE}))', "dials_total {{code}}"),
            Query(f"sum by (why) (increase(<<retries_total>>{RATE}))", "retries_total {{why}}"),
        ),
        table(
            "Paired, and nothing handed over",
            "short",
            Query("max by (engine, rank, cause) (<<unused_pair>>) > 0"),
        ),
    ),
    "What the transport chose": (
        lines(
            "Bytes on the wire by backend and format",
            "binBps",
            Query(
                f"sum by (side, backend, wire_dtype) (rate(<<transferred_bytes_total>>{RATE}))",
                "{{side}} {{backend}} {{wire_dtype}}",
            ),
            text="The card says of each link why.",
        ),
        lines(
            "Open",
            "short",
            *(
                Query(f"sum(<<{name}>>)", name)
                for name in ("sessions", "offers", "subscriptions", "conversions")
            ),
        ),
    ),
    "Conversion and stages": (
        lines(
            "Work",
            "percentunit",
            Query(f"sum by (work) (rate(<<conversion_seconds_total>>{RATE}))", "conversion: {{work}}"),
            Query(f"sum by (work) (rate(<<lane_seconds_total>>{RATE}))", "lanes: {{work}}"),
            text="Seconds of work a second.",
            stacked=True,
        ),
        lines(
            "Average stages of a transfer",
            "s",
            Query(
                f"sum by (side, stage) (rate(<<stage_seconds_sum>>{RATE})) / on (side) group_left ()"
                f" sum by (side) (rate(<<transfer_seconds_count>>{RATE}))",
                "{{side}} {{stage}}",
            ),
            stacked=True,
        ),
        lines(
            "Staging memory",
            "bytes",
            Query("sum by (engine, rank) (<<staging_bytes>>)", "{{engine}}[{{rank}}] in use"),
            Query("sum by (engine, rank) (<<staging_limit_bytes>>)", "{{engine}}[{{rank}}] there is"),
        ),
        Panel(
            "Hot chunks",
            "bargauge",
            "short",
            12,
            9,
            (
                Query(
                    "sort_desc(topk(10, max by (engine, rank, place) (<<hot_chunk_handovers>>)))",
                    "{{engine}} {{place}}",
                ),
            ),
            "How often the chunk at each place was handed over.",
            instant=True,
            options={
                "orientation": "horizontal",
                "displayMode": "basic",
                "reduceOptions": {"calcs": ["lastNotNull"]},
            },
        ),
    ),
}
