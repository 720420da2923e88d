# SPDX-License-Identifier: Apache-2.0
"""What happens in one run, drawn from a seed: it can be printed, repeated and made smaller. Times are seconds."""

from __future__ import annotations

import random
from typing import NamedTuple

from tests.simulation.server import Layout

LAYOUTS = (Layout(16), Layout(16, fused=True), Layout(8), Layout(32), Layout(24, fused=True))


class Options(NamedTuple):
    """Of every server of a run."""

    deadline_s: float
    lease_s: float
    unmatched_timeout_s: float
    peer_timeout_s: float
    connect_timeout_s: float
    lanes: int
    pulls: bool
    packets: int  #: in flight, of one direction of a link
    shortest_s: float
    longest_s: float
    corrupt: int  #: of 1,000 chunks
    duplicate: int
    integrity: str
    staging_bytes: int
    knows_pages: bool  #: the backend's lanes do
    layouts: tuple[Layout, Layout]  #: prefill's, decode's


class Load(NamedTuple):
    """What a decode server wants of a request."""

    server: int
    at_s: float
    deadline_s: float
    first_page: int  #: it has those before
    cancel_s: float = 0.0  #: after it asked; 0: never
    declines: bool = False  #: it wants nothing, and says so
    other_prompt: bool = False
    never_comes: bool = False
    renews: bool = False


class Request(NamedTuple):
    """One prompt. ``how`` prefill ends: finished, withdrawn, given_up, preempted (and offered again), never."""

    number: int
    server: int
    tokens: int
    offered_s: float
    steps: int
    step_s: float
    by_layer: bool
    how: str
    ends_s: float  #: after it was offered, where it does not finish
    waits: bool  #: for the end of a withdrawal
    consumers: int
    loads: tuple[Load, ...]


class Fault(NamedTuple):
    """``kind`` at a time, of server ``server`` (decode's behind prefill's), for ``for_s``."""

    kind: str
    at_s: float
    server: int
    for_s: float


class Schedule(NamedTuple):
    seed: int
    prefills: int
    decodes: int
    options: Options
    requests: tuple[Request, ...]
    faults: tuple[Fault, ...]


FAULTS = (
    "cut", "cut", "cut", "cut_silently", "cut_silently", "kill", "kill_silently", "restart", "stop", "freeze", "busy",
    "jump", "slow", "hostile", "noise", "flood", "unreachable", "die",
)  # fmt: skip


#: What a peer does that means harm.
HARMLESS = ("hostile", "noise", "flood")


def drawn(seed: int) -> Schedule:
    rng = random.Random(seed)
    prefills, decodes = rng.choice(((1, 1), (1, 1), (1, 2), (2, 1), (2, 2)))
    one = rng.choice(LAYOUTS)
    options = Options(
        deadline_s=rng.choice((2.0, 10.0, 60.0)),
        lease_s=rng.choice((1.0, 5.0, 30.0)),
        unmatched_timeout_s=rng.choice((1.0, 5.0, 30.0)),
        peer_timeout_s=rng.choice((1.5, 5.0, 15.0)),
        connect_timeout_s=rng.choice((1.0, 5.0)),
        lanes=rng.choice((1, 1, 2, 3)),
        pulls=rng.random() < 0.5,
        packets=rng.choice((1, 2, 8)),
        shortest_s=1e-5,
        longest_s=rng.choice((1e-4, 1e-3, 0.05, 0.3)),
        corrupt=rng.choice((0, 0, 0, 20)),
        duplicate=rng.choice((0, 0, 0, 20)),
        integrity=rng.choice(("auto", "crc", "generation")),
        staging_bytes=rng.choice((4096, 16384, 65536)),
        knows_pages=rng.random() < 0.8,
        layouts=(one, one if rng.random() < 0.5 else rng.choice(LAYOUTS)),
    )
    requests = tuple(
        _request(rng, number, prefills, decodes, options) for number in range(rng.choice((1, 1, 2, 3, 5)))
    )
    until = max(r.offered_s + r.steps * r.step_s for r in requests) + 1.0
    faults = tuple(
        _fault(rng, requests, prefills + decodes, until) for _ in range(rng.choice((0, 0, 1, 1, 2, 3)))
    )
    special = rng.random()
    if special < 0.05:
        requests, faults = _forgotten(rng, requests[0])
    elif special < 0.12:
        requests, faults = _flooded(requests[0])
    return Schedule(seed, prefills, decodes, options, requests, tuple(sorted(faults, key=lambda f: f.at_s)))


def _forgotten(rng: random.Random, request: Request) -> tuple[tuple[Request, ...], tuple[Fault, ...]]:
    """The same pair twice, and between them the network forgets the connection."""
    pause_s = rng.uniform(3.0, 30.0)
    later = request._replace(
        number=1,
        offered_s=request.offered_s + pause_s,
        loads=tuple(load._replace(at_s=load.at_s + pause_s) for load in request.loads),
    )
    cut = Fault("cut_silently", later.loads[0].at_s - rng.uniform(0.2, 2.5), request.server, 1.0)
    return (request, later), (cut,)


def _flooded(request: Request) -> tuple[tuple[Request, ...], tuple[Fault, ...]]:
    """Decode asks before prefill began, and somebody else asked for much before that."""
    loads = tuple(load._replace(at_s=1.0) for load in request.loads)
    return (request._replace(offered_s=5.7, loads=loads),), (Fault("flood", 0.7, request.server, 1.0),)


def _fault(rng: random.Random, requests: tuple[Request, ...], servers: int, until: float) -> Fault:
    at_s = rng.uniform(0, until)
    if rng.random() < 0.6:  # while something goes on
        request = rng.choice(requests)
        at_s = rng.choice(request.loads).at_s + rng.uniform(0, request.steps * request.step_s + 0.01)
    kind, server = rng.choice(FAULTS), rng.randrange(servers)
    if kind in HARMLESS:  # where and when it would harm most
        request = rng.choice(requests)
        at_s, server = max(0.0, rng.choice(request.loads).at_s - rng.uniform(0, 0.1)), request.server
    return Fault(kind, round(at_s, 5), server, rng.choice((0.05, 0.5, 3.0, 20.0)))


def _request(rng: random.Random, number: int, prefills: int, decodes: int, options: Options) -> Request:
    offered_s = rng.uniform(0, rng.choice((0.5, 5.0)))
    steps, step_s = rng.choice((1, 2, 4)), rng.choice((1e-4, 0.01, 0.2))
    prefill_s = steps * step_s
    servers = rng.sample(range(decodes), rng.randint(1, decodes))
    tokens = rng.choice((16, 48, 96, 160))
    return Request(
        number=number,
        server=rng.randrange(prefills),
        tokens=tokens,
        offered_s=offered_s,
        steps=steps,
        step_s=step_s,
        by_layer=rng.random() < 0.5,
        how=rng.choice(("finished",) * 8 + ("withdrawn", "given_up", "preempted", "never")),
        ends_s=rng.uniform(0, prefill_s * 1.5),
        waits=rng.random() < 0.5,
        consumers=len(servers),
        loads=tuple(_load(rng, server, offered_s, prefill_s, tokens, options) for server in servers),
    )


def _load(
    rng: random.Random, server: int, offered_s: float, prefill_s: float, tokens: int, options: Options
) -> Load:
    # Before prefill, at its side, just behind it, or late enough to lose against the lease.
    at_s = offered_s + rng.choice(
        (
            rng.uniform(-0.5, 0),
            rng.uniform(0, prefill_s),
            prefill_s + 0.001,
            prefill_s + rng.uniform(0, 1.2) * options.lease_s,
        )
    )
    pages = tokens // options.layouts[1].page_size
    return Load(
        server=server,
        at_s=max(0.0, at_s),
        deadline_s=rng.choice((0.1, options.deadline_s, options.deadline_s)),
        first_page=rng.choice((0, 0, pages // 2)),
        cancel_s=rng.choice((0.0, 0.0, 0.0, rng.uniform(0.0001, prefill_s + 0.2))),
        declines=rng.random() < 0.05,
        other_prompt=rng.random() < 0.05,
        never_comes=rng.random() < 0.05,
        renews=rng.random() < 0.1,
    )
