# SPDX-License-Identifier: Apache-2.0
"""Real libraries read what is scattered: without one failure, since what fails comes right all the same."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from sage_kv_connector.backends.base import EventKind, Status
from tests.backends.kinds import KINDS, Kind
from tests.backends.pair import Pair, random_bytes, table

PAGE, PAGES = 20_000, 200
CARRIED = [kind for kind in KINDS if kind.name in ("nixl", "mooncake", "this-machine")]


@pytest.fixture(params=CARRIED, ids=[kind.name for kind in CARRIED])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    kind: Kind = request.param
    made = Pair(kind, chunk_bytes=1 << 20)
    yield made
    made.close()


@pytest.mark.parametrize("together", [True, False])
def test_scattered_pages_are_read_without_a_failure(pair: Pair, together: bool) -> None:
    """Shuffled on both sides; ``together``: memory that was registered before the session, else after."""
    source, target = random_bytes(PAGE * PAGES), np.zeros(PAGE * PAGES, np.uint8)
    order = np.random.default_rng(3)
    here, there = order.permutation(PAGES), order.permutation(PAGES)
    backends = ((pair.sender, source), (pair.receiver, target))
    for backend, memory in backends:
        address = memory.ctypes.data
        if together:
            backend.register_memory(address, memory.nbytes)
        else:
            for page in range(PAGES):
                backend.register_memory(address + page * PAGE, PAGE)
    segments = table([(target.ctypes.data + int(page) * PAGE, PAGE) for page in there])
    window = pair.receiver.open_window(pair.to_sender, segments, 1)
    rows = table([(source.ctypes.data + int(page) * PAGE, at * PAGE, PAGE) for at, page in enumerate(here)])
    post = pair.sender.post(pair.to_receiver, pair.receiver.window_descriptor(window), rows, 1)
    assert pair.ended(window).kind == EventKind.WINDOW_DONE
    assert pair.sent(post).status == Status.OK
    assert np.array_equal(source.reshape(PAGES, PAGE)[here], target.reshape(PAGES, PAGE)[there])
    assert pair.receiver.counters()["reads_failed"] == 0
    assert pair.sender.connection_info(pair.to_receiver).mode == pair.kind.mode
