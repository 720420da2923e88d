# SPDX-License-Identifier: Apache-2.0
"""Windows that kernels fill from a peer's memory: when offers are answered, and what a peer may get wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, cast

import numpy as np
import pytest

from sage_kv_connector.backends.base import EventKind, Status
from sage_kv_connector.backends.pcie import messages as pm
from sage_kv_connector.backends.pcie.incoming import Incoming
from sage_kv_connector.backends.pcie.ipc_memory import IpcMemory
from sage_kv_connector.devices.runtime import DeviceError, Launch

CONNECTION, SIZE, SOURCE = 1, 1000, 1 << 30
LAUNCH: Launch = (1, (1, 1), 1, 0, b"")


class Runtime:
    """Launches wait until ``go``; ``fails`` ends them."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.launched = 0
        self.fails = False

    def stream_create(self, device: int) -> int:
        return 1

    event_create = stream_create

    def launch(self, device: int, launch: Launch, stream: int) -> None:
        self.begun.set()
        assert self.go.wait(10)
        self.launched += 1
        if self.fails:
            raise DeviceError("vendor", "launch", 7, "KERNEL_FAILED")

    def copy_batch_async(self, *arguments: Any) -> None:
        raise AssertionError("nothing is copied")

    def nothing(self, *arguments: int) -> None:
        pass

    event_record = event_synchronize = event_destroy = stream_destroy = stream_synchronize = nothing


class Side:
    """Half of a backend; ``read`` gives a launch for each offer, or what ``reads`` says."""

    def __init__(self) -> None:
        self.runtime, self.told, self.events = Runtime(), list[Any](), list[Any]()
        self.reads: Any = [[LAUNCH, LAUNCH]]
        self.rows: list[Any] = []
        memory: Any = type(
            "Memory", (), {"runtime": self.runtime, "device": 0, "opened": lambda *_: [SOURCE]}
        )()
        self.woken = threading.Semaphore(0)
        self.incoming = Incoming(
            cast(IpcMemory, memory),
            count(1),
            lambda *event: self.events.append(event),
            self.tell,
            self.woken.release,
        )
        self.window = self.incoming.open_read_window(CONNECTION, SIZE, 7, self.read)

    def tell(self, connection: int, message: pm.Message) -> None:
        assert isinstance(message, pm.Taken)
        self.told.append((message.post, message.part, message.status))

    def read(self, rows: Any) -> list[Sequence[Launch]]:
        self.rows += rows.tolist()
        if isinstance(self.reads, Exception):
            raise self.reads
        return list(self.reads)

    def offer(self, *ranges: tuple[int, int], post: int = 3, part: int = 0) -> None:
        rows = np.array([[0, 10 * at, at, n] for at, n in ranges], dtype="<u8").tobytes()
        self.incoming.on_offered(
            CONNECTION, pm.Offered(post, part, self.window, 7, (b"h",), (1 << 20,), rows)
        )

    def finish(self, jobs: int) -> None:
        self.runtime.go.set()
        for _ in range(jobs):
            assert self.woken.acquire(timeout=10)
            self.incoming.take_copied()

    def ends(self) -> list[tuple[EventKind, Status]]:
        return [(kind, status) for kind, _, _, status, _, _ in self.events]


@pytest.fixture
def side() -> Iterator[Side]:
    made = Side()
    yield made
    made.runtime.go.set()
    made.incoming.close()


def test_offers_are_held_until_the_whole_window_was_read(side: Side) -> None:
    """A kernel may need bytes of several: prefill frees none of them before."""
    side.offer((500, 500), part=1)
    side.finish(1)
    assert not side.told and not side.events
    side.offer((0, 500))
    side.finish(1)
    assert side.told == [(3, 1, Status.OK), (3, 0, Status.OK)]
    assert side.ends() == [(EventKind.WINDOW_DONE, Status.OK)]
    assert side.rows == [[SOURCE + 5000, 500, 500], [SOURCE, 0, 500]]
    assert (side.runtime.launched, side.incoming.reads, side.incoming.read_bytes) == (4, 2, SIZE)
    assert side.incoming.close_window(side.window) == SIZE


def test_a_window_is_not_done_while_a_kernel_runs(side: Side) -> None:
    side.offer((0, SIZE))
    assert not side.told and not side.events and len(side.incoming) == 1
    side.finish(1)
    assert side.ends() == [(EventKind.WINDOW_DONE, Status.OK)]


def test_bytes_that_nobody_reads_are_answered_too(side: Side) -> None:
    side.reads = []
    side.offer((0, SIZE))
    assert side.told == [(3, 0, Status.OK)] and side.ends() == [(EventKind.WINDOW_DONE, Status.OK)]


@pytest.mark.parametrize("ranges", [[(0, 1001)], [(1000, 1)], [(0, 10), (5, 10)], [(5, 2**64 - 2)]])
def test_ranges_that_don_t_fit_fail_the_window(side: Side, ranges: list[tuple[int, int]]) -> None:
    rows = np.array([[0, 0, at, n] for at, n in ranges], dtype="<u8").tobytes()
    side.incoming.on_offered(CONNECTION, pm.Offered(3, 0, side.window, 7, (b"h",), (2**64 - 1,), rows))
    assert not side.rows, "nothing is launched of it"
    assert side.ends() == [(EventKind.WINDOW_FAILED, Status.OUT_OF_BOUNDS)]
    assert side.told == [(3, 0, Status.OUT_OF_BOUNDS)]


def test_bytes_that_came_before_fail_the_window_once_its_kernels_are_over(side: Side) -> None:
    side.offer((0, 10))
    side.offer((5, 10), part=1)
    assert side.ends() == [(EventKind.WINDOW_FAILED, Status.OUT_OF_BOUNDS)] and not side.told
    side.finish(1)
    assert side.told == [(3, 0, Status.OUT_OF_BOUNDS), (3, 1, Status.OUT_OF_BOUNDS)]
    side.offer((20, 980), part=2)
    assert side.told[2:] == [(3, 2, Status.CANCELLED)] and side.runtime.launched == 2


def test_what_can_t_be_read_fails_the_window(side: Side) -> None:
    side.reads = ValueError("no pages")
    side.offer((0, 10))
    assert side.ends() == [(EventKind.WINDOW_FAILED, Status.NOT_CONVERTED)] and "no pages" in side.events[0]
    assert side.told == [(3, 0, Status.NOT_CONVERTED)]


def test_a_kernel_that_fails_names_the_vendors_error(side: Side) -> None:
    side.runtime.fails = True
    side.offer((0, SIZE))
    side.finish(1)
    assert (
        side.ends() == [(EventKind.WINDOW_FAILED, Status.IO_ERROR)] and "KERNEL_FAILED" in side.events[0][-1]
    )
    assert side.told == [(3, 0, Status.IO_ERROR)] and side.incoming.reads == 0


def test_what_was_revoked_never_counts_and_is_answered_once_it_is_not_read(side: Side) -> None:
    side.offer((0, SIZE))
    side.incoming.on_revoked(CONNECTION, 3)
    assert not side.told
    side.finish(1)
    assert side.told == [(3, 0, Status.CANCELLED)] and not side.events


def test_another_connection_revokes_nothing(side: Side) -> None:
    side.offer((0, SIZE))
    side.incoming.on_revoked(CONNECTION + 1, 3)
    side.incoming.on_revoked(CONNECTION, 4)
    side.finish(1)
    assert side.told == [(3, 0, Status.OK)]


def test_closing_waits_for_kernels_and_answers(side: Side) -> None:
    side.offer((0, SIZE))
    assert side.runtime.begun.wait(10)
    closes = threading.Thread(target=side.incoming.close_window, args=(side.window,))
    closes.start()
    closes.join(0.2)
    assert closes.is_alive() and not side.told, "a kernel still runs"
    side.runtime.go.set()
    closes.join(10)
    side.incoming.take_copied()
    assert side.told == [(3, 0, Status.CANCELLED)] and not side.events


def test_a_lost_connection_ends_its_windows_and_waits_for_kernels(side: Side) -> None:
    side.offer((0, SIZE))
    assert side.runtime.begun.wait(10)
    lost = threading.Thread(target=side.incoming.on_lost, args=(CONNECTION, "gone"))
    lost.start()
    lost.join(0.2)
    assert lost.is_alive(), "the peer's memory must stay open"
    side.runtime.go.set()
    lost.join(10)
    assert side.ends() == [(EventKind.WINDOW_FAILED, Status.CONNECTION_LOST)] and not side.told
    assert len(side.incoming) == 0


@pytest.mark.parametrize(("nbytes", "generation"), [(0, 7), (10, 0)])
def test_a_window_of_nothing_is_refused(side: Side, nbytes: int, generation: int) -> None:
    with pytest.raises(ValueError, match="neither may be 0"):
        side.incoming.open_read_window(CONNECTION, nbytes, generation, side.read)
