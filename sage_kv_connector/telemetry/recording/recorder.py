# SPDX-License-Identifier: Apache-2.0
"""What an engine writes down of its transfers: sums by label, the last ones whole, the hottest chunks.

The control thread writes, anybody reads: a short lock, no allocation that grows with traffic. Records of transfers are
added up some at a time, or when somebody reads: one alone would find the core's caches cold, and cost several times as
much.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from sage_kv_connector.contract.prompt import Prompt
from sage_kv_connector.telemetry.recording.histogram import Histogram
from sage_kv_connector.telemetry.recording.hot_chunks import CHUNK_TOKENS, MOST_OF_A_PROMPT, HotChunks
from sage_kv_connector.telemetry.recording.metrics import METRICS, Kind
from sage_kv_connector.telemetry.recording.pair_watch import PairWatch
from sage_kv_connector.telemetry.recording.snapshot import (
    HotChunk,
    Note,
    Sample,
    SeriesKey,
    Times,
    TransferRecord,
)
from sage_kv_connector.telemetry.recording.spans import LOAD, OFFER, SEND, Spans, UnreachedLoad

#: Peers with series of their own. One more takes the place of the one that was quiet longest; that one's numbers
#: go on as those of ``OTHER``.
MAX_PEERS = 64
OTHER = "other"
#: Transfers and notes that are kept whole, the newest.
MAX_TRANSFERS, MAX_NOTES = 128, 32
MOST_HOT = 10
#: Records that are added up at once, at the latest.
ADDED_AT_ONCE = 16

#: Counters of requests for which nothing was handed over, by code.
_FAILED = ("failed_loads_total", "failed_offers_total")
_COUNTERS, _HISTOGRAMS = (
    {name: metric for name, metric in METRICS.items() if metric.kind is kind}
    for kind in (Kind.COUNTER, Kind.HISTOGRAM)
)
#: Of counters that have one: where the peer stands among the labels.
_PEER_AT = {
    name: metric.labels.index("peer") for name, metric in _COUNTERS.items() if "peer" in metric.labels
}


Labels = tuple[str, ...]


class LinkBytes(NamedTuple):
    """What a connection of a backend moved since it opened."""

    backend: str
    connection: int
    peer: str
    sent: int
    landed: int


class Recorder:
    """Of one engine. Any thread. ``spans``: where transfers become spans, if anywhere."""

    def __init__(self, spans: Spans | None = None) -> None:
        self._spans = spans
        self._lock = threading.Lock()
        #: By metric, then by labels.
        self._sums: dict[str, defaultdict[Labels, float]] = {name: defaultdict(float) for name in _COUNTERS}
        self._times: dict[str, defaultdict[Labels, Histogram]] = {
            name: defaultdict(Histogram) for name in _HISTOGRAMS
        }
        self._peers: OrderedDict[str, None] = OrderedDict()
        self._transfers: deque[TransferRecord] = deque(maxlen=MAX_TRANSFERS)
        self._not_added: list[TransferRecord] = []  #: the newest of them, which are not in the sums yet
        self._notes: deque[Note] = deque(maxlen=MAX_NOTES)
        self._hot = HotChunks()
        self._pair = PairWatch()
        self.ended_transfers = 0  #: how many so far
        #: After each of them, and each count; short, any thread.
        self.on_changed: Callable[[], object] = lambda: None
        self._best: dict[tuple[str, str], float] = {}
        self._told: dict[tuple[str, int], tuple[int, int]] = {}  #: bytes of connections that are in the sums

    def add(self, metric: str, labels: tuple[str, ...] = (), value: float = 1) -> None:
        """To a counter; ``labels`` in the order of ``METRICS``."""
        with self._settled():
            known = METRICS[metric]
            if metric not in _COUNTERS or len(labels) != len(known.labels):
                raise ValueError(f"{metric} is a {known.kind} with labels {known.labels}, given {labels}")
            self._sums[metric][labels] += value
            if metric in _FAILED:
                self._note(self._pair.failed(labels[0]))
        self.on_changed()

    def unpaired(self, requests: int) -> None:
        """So many requests came that ask for no hand-over."""
        with self._settled():
            self._note(self._pair.unpaired(requests))

    def links(self, read: Callable[[], Iterable[LinkBytes]]) -> list[LinkBytes]:
        """What connections moved so far. ``read`` is called with the lock, so that none closes in between."""
        with self._settled():
            moved = list(read())
            for link in moved:
                self._moved(link)
        return moved

    def closed(self, link: LinkBytes) -> None:
        """All that a connection moved. Its backend knows it no more."""
        with self._settled():
            self._moved(link)
            self._told.pop((link.backend, link.connection), None)

    def ended(self, record: TransferRecord) -> TransferRecord:
        """A transfer is over, well or not. Returns the record."""
        if self._spans is not None and record.peer:
            self._spans.put(LOAD if record.side == "decode" else SEND, record)
        with self._lock:
            self.ended_transfers += 1
            self._transfers.append(record)
            self._not_added.append(record)
            if len(self._not_added) >= ADDED_AT_ONCE:
                self._add_up()
        self.on_changed()
        return record

    def unreached(self, load: UnreachedLoad) -> None:
        """A load that had nobody to ask: no transfer, but a span."""
        if self._spans is not None:
            self._spans.put(LOAD, load.record())

    def released(self, record: TransferRecord, *, fetched: bool) -> bool:
        """An offer is over. Whether it counts as a transfer itself: one that nobody took anything of."""
        if self._spans is not None:
            self._spans.put(OFFER, record)
        if not fetched:
            self.ended(record)
        return not fetched

    def close(self) -> None:
        """Send the spans that wait. Idempotent."""
        if self._spans is not None:
            self._spans.close()

    def handed_over(self, prompt: Prompt | None) -> None:
        """The KV of this prompt left for decode."""
        if prompt is not None:
            chunks = prompt.chunks(CHUNK_TOKENS, MOST_OF_A_PROMPT)
            with self._lock:
                self._hot.add(chunks)

    def best(self, peer: str, backend: str) -> float:
        """Bytes a second of the fastest transfer over a link, 0 before there was one."""
        with self._settled():
            return self._best.get((peer if peer in self._peers else OTHER, backend), 0.0)

    # -- reading

    def samples(self) -> list[Sample]:
        with self._settled():
            found = [
                Sample(metric, labels, value)
                for metric, sums in self._sums.items()
                for labels, value in sums.items()
            ]
            found += [
                Sample("link_capacity_bytes_per_second", (*link, "best"), rate)
                for link, rate in self._best.items()
            ]
            found += self._pair.samples()
        found += [
            Sample("hot_chunk_handovers", (str(place),), chunk.handovers)
            for place, chunk in enumerate(self.hot_chunks(), 1)
        ]
        return found

    def times(self) -> list[Times]:
        with self._settled():
            return [
                Times(metric, labels, tuple(one.counts), tuple(one.seconds))
                for metric, times in self._times.items()
                for labels, one in times.items()
            ]

    def transfers(self) -> tuple[TransferRecord, ...]:
        """The oldest first."""
        with self._lock:
            return tuple(self._transfers)

    def notes(self) -> tuple[Note, ...]:
        with self._settled():
            return tuple(self._notes)

    def hot_chunks(self) -> tuple[HotChunk, ...]:
        with self._lock:
            return self._hot.hottest(MOST_HOT)

    # -- inside

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """The lock, and every transfer that ended in the sums."""
        with self._lock:
            self._add_up()
            yield

    # -- inside, with the lock

    def _add_up(self) -> None:
        for record in self._not_added:
            self._ended(record)
        self._not_added.clear()

    def _ended(self, record: TransferRecord) -> None:
        peer = self._known(record.peer)
        labels = (record.side, peer, record.backend, record.wire_dtype, str(record.priority))
        sums, times = self._sums, self._times
        sums["transfers_total"][(*labels, record.code)] += 1
        if record.code != "ok":
            sums["lost_seconds_total"][record.side, record.code] += record.seconds
            return
        self._pair.worked()
        sums["transferred_bytes_total"][labels] += record.nbytes
        sums["kv_bytes_total"][labels] += record.kv_bytes
        times["transfer_seconds"][record.side, record.backend].add(record.seconds)
        of_stage = times["stage_seconds"]
        for stage, seconds in record.stages:
            of_stage[record.side, stage].add(seconds)
        wire_s = dict(record.stages).get("wire", 0.0)
        if wire_s > 0:
            link = (peer, record.backend)
            self._best[link] = max(self._best.get(link, 0.0), record.nbytes / wire_s)

    def _note(self, note: Note | None) -> None:
        if note is not None:
            self._notes.append(note)

    def _moved(self, link: LinkBytes) -> None:
        key, peer = (link.backend, link.connection), self._known(link.peer)
        sent, landed = self._told.get(key, (0, 0))
        moved = self._sums["link_bytes_total"]
        moved[peer, link.backend, "sent"] += max(0, link.sent - sent)
        moved[peer, link.backend, "landed"] += max(0, link.landed - landed)
        self._told[key] = (link.sent, link.landed)

    def _known(self, peer: str) -> str:
        if not peer:
            return ""
        self._peers[peer] = None
        self._peers.move_to_end(peer)
        if len(self._peers) > MAX_PEERS:
            self._forget(self._peers.popitem(last=False)[0])
        return peer

    def _forget(self, peer: str) -> None:
        for metric, at in _PEER_AT.items():
            sums = self._sums[metric]
            for labels in [labels for labels in sums if labels[at] == peer]:
                value = sums.pop(labels)
                sums[_of_other(labels, at)] += value
        for link in [link for link in self._best if link[0] == peer]:
            rate = self._best.pop(link)
            self._best[(OTHER, link[1])] = max(rate, self._best.get((OTHER, link[1]), 0.0))


def of_other(key: SeriesKey) -> SeriesKey:
    """The series that goes on with the numbers of one whose peer lost its own; itself if it has no peer."""
    at = _PEER_AT.get(key.metric)
    return key if at is None else SeriesKey(key.metric, _of_other(key.labels, at))


def _of_other(labels: Labels, at: int) -> Labels:
    return (*labels[:at], OTHER, *labels[at + 1 :])
