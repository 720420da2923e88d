# SPDX-License-Identifier: Apache-2.0
"""Every metric: name, kind, labels and meaning, in one table. Prometheus, documents and snapshots are made of it.

Names are without the prefix ``sage_kvt_``. Units are base units: seconds, bytes. Counters end in ``_total``.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

PREFIX = "sage_kvt_"

#: Upper ends of the buckets of every histogram of times, in seconds: powers of two from 1 µs on (csrc/measured.h).
BUCKETS = tuple(2.0**k * 1e-6 for k in range(27))


class Kind(StrEnum):
    """As in Prometheus."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Metric(NamedTuple):
    """``labels`` beside those of the engine, in the order in which values are written down."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    text: str


def _named(*metrics: Metric) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics}


_ENDED = ("side", "peer", "backend", "wire_dtype", "priority")

METRICS = _named(
    Metric(
        "transfers_total",
        Kind.COUNTER,
        (*_ENDED, "code"),
        "Transfers that ended. code: ok, or the failure code; side: decode (came in) or prefill (went out).",
    ),
    Metric(
        "transferred_bytes_total",
        Kind.COUNTER,
        _ENDED,
        "Bytes on the wire of transfers that ended well.",
    ),
    Metric(
        "kv_bytes_total",
        Kind.COUNTER,
        _ENDED,
        "Bytes that the same transfers have in the caches: over transferred_bytes_total they are the compression.",
    ),
    Metric("transfer_seconds", Kind.HISTOGRAM, ("side", "backend"), "From asking for a transfer to its end."),
    Metric(
        "stage_seconds",
        Kind.HISTOGRAM,
        ("side", "stage"),
        "Stages of transfers that ended well; of one transfer they follow each other and fill its time.",
    ),
    Metric(
        "lost_seconds_total",
        Kind.COUNTER,
        ("side", "code"),
        "Time spent on transfers that failed: what a recompute costs before it begins.",
    ),
    Metric(
        "failed_loads_total",
        Kind.COUNTER,
        ("code",),
        "Requests whose KV did not arrive and was computed again, from however many ranks it was to come.",
    ),
    Metric("failed_offers_total", Kind.COUNTER, ("code",), "Prefills whose KV pages were not fetched."),
    Metric(
        "recomputed_tokens_total",
        Kind.COUNTER,
        ("code",),
        "Prompt tokens whose KV did not arrive, and which decode computed again.",
    ),
    Metric(
        "retries_total",
        Kind.COUNTER,
        ("why",),
        "Transfers asked for again. why: session_lost (dialled again) or busy (the peer named a time).",
    ),
    Metric(
        "dials_total",
        Kind.COUNTER,
        ("code",),
        "Attempts to reach a peer, by what came of them: ok or a failure code.",
    ),
    Metric("refused_peers_total", Kind.COUNTER, ("code",), "Connections that were not let in."),
    Metric(
        "link_bytes_total",
        Kind.COUNTER,
        ("peer", "backend", "direction"),
        "Bytes of KV that lanes moved, as they move. direction: sent or landed.",
    ),
    Metric("chunks_total", Kind.COUNTER, ("backend", "direction"), "Chunks that lanes moved."),
    Metric(
        "lane_seconds_total",
        Kind.COUNTER,
        ("backend", "work"),
        "Time of lanes. work: send, place (into pages), verify (checksums and tags), copy (from device to device).",
    ),
    Metric(
        "conversion_seconds_total",
        Kind.COUNTER,
        ("work",),
        "Time that conversion threads worked. work: encode or decode.",
    ),
    Metric("converted_bytes_total", Kind.COUNTER, ("work",), "Wire bytes that were encoded and decoded."),
    Metric("posting_seconds_total", Kind.COUNTER, (), "Time with at least one post under way."),
    Metric(
        "small_post_seconds",
        Kind.HISTOGRAM,
        ("backend",),
        "Posts of at most 64 KiB, from being queued until the peer has them.",
    ),
    Metric("checksum_failures_total", Kind.COUNTER, ("backend",), "Chunks whose CRC32C was wrong."),
    Metric("forged_frames_total", Kind.COUNTER, ("backend",), "Frames that did not hold their tag."),
    Metric("stale_chunks_total", Kind.COUNTER, ("backend",), "Chunks of a revoked or older generation."),
    Metric(
        "refused_chunks_total",
        Kind.COUNTER,
        ("backend",),
        "Chunks outside what was asked for, or sent twice.",
    ),
    Metric(
        "stalls_total",
        Kind.COUNTER,
        ("backend",),
        "Times a lane had bytes to send and no room to send them to.",
    ),
    Metric("offers", Kind.GAUGE, (), "Transfers on offer, and subscriptions that wait for their prefill."),
    Metric("subscriptions", Kind.GAUGE, (), "Transfers being received."),
    Metric("sessions", Kind.GAUGE, (), "Sessions with peers."),
    Metric("windows", Kind.GAUGE, ("backend",), "Windows that peers may fill."),
    Metric("posts", Kind.GAUGE, ("backend",), "Posts under way."),
    Metric("conversions", Kind.GAUGE, (), "Transfers being converted."),
    Metric("staging_bytes", Kind.GAUGE, (), "Staging memory in use."),
    Metric("staging_limit_bytes", Kind.GAUGE, (), "Staging memory that there is."),
    Metric("loads", Kind.GAUGE, (), "Requests that wait for their KV."),
    Metric("on_offer", Kind.GAUGE, (), "Prefills whose KV pages are held for decode."),
    Metric(
        "aborted_loads_total", Kind.COUNTER, (), "Requests that were aborted while they waited for their KV."
    ),
    Metric(
        "link_capacity_bytes_per_second",
        Kind.GAUGE,
        ("peer", "backend", "source"),
        "What the link to a peer can carry. source: nic (its speed) or best (the fastest transfer so far).",
    ),
    Metric(
        "hot_chunk_handovers",
        Kind.GAUGE,
        ("place",),
        "How often the chunk of prompts at this place (1: the hottest) was handed over.",
    ),
    Metric(
        "unused_pair",
        Kind.GAUGE,
        ("cause",),
        "1 while prefill and decode are paired and nothing is handed over, by the cause; 0 afterwards.",
    ),
)
