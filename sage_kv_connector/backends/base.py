"""What a backend is: bytes from here into a window over there, and nothing about KV.

Memory model
------------
A backend moves bytes between *memory regions* (``register_memory``) of two processes. The receiving side opens a
*window* for one connection: an ordered list of segments (address, length) of its own registered memory that together
form one linear space ``[0, size)``. The sending side posts *descriptors* (local address, offset in the peer's window,
length). So a sender never learns or names an address of the receiver: each side maps its own pages, and bounds are
checked on both sides against what was registered and opened.

How the bytes cross is the backend's own business: shm lets the receiver read straight from the sender's pages (or
goes through a shared arena), tcp gathers and scatters on a socket, rdma has the receiver's card read.

Integrity
---------
Each post and each window carries a 64-bit *generation*; a chunk is accepted
only when they are equal, and, where the receiver pulls, only when the sender
had not revoked the post by the time the copy ended. With ``checksum=True`` a
CRC32C of each chunk is verified after placement. A range counts once: bytes
that would land twice are refused, so a window is done only if every byte of
it arrived exactly once and held.

Life of a transfer
------------------
::

    receiver                                   sender
    window = open_window(conn, segments, g)
    send(conn, <window.descriptor, in a message of the layer above>)
                                               op = post(conn, descriptor, descriptors, g)
    [LANDED per chunk, if asked for]
    WINDOW_DONE | WINDOW_FAILED                SENT (status says how it ended)
    close_window(window)

``SENT`` means that the local memory of the post may be reused; it comes
exactly once for each accepted post, whatever happens. ``WINDOW_DONE`` or
``WINDOW_FAILED`` comes at most once for each window. After ``close_window``
returns, the backend writes no byte into the window's memory any more.
``CLOSED`` comes exactly once for each connection, after every event that
belonged to it: posts in flight end with ``SENT``/``CONNECTION_LOST``, open
windows with ``WINDOW_FAILED``/``CONNECTION_LOST``.

Implementor's contract
----------------------
* No method but ``wait`` and ``close`` blocks for longer than a copy of one chunk.
* Methods may be called from any thread; events come out of one queue, in
  order for each connection, through ``poll``.
* ``fileno`` is readable (poll/epoll) while events wait.
* Bad arguments raise ``ValueError`` naming the argument, the value and what is
  allowed; what a peer does wrong never raises here: it ends the connection or
  the window with a status and a detail.
* ``open_window`` and ``post`` on a connection that is gone raise ``ConnectionError``: its CLOSED was polled, or
  waits in the queue. Every other method ignores such a connection.
* Memory held for a peer is bounded, authenticated or not.
* Nothing spins while idle.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

#: uint64 array of shape (n, 2): address, length in bytes.
Segments = npt.NDArray[np.uint64]
#: uint64 array of shape (n, 3): local address, offset in the peer's window, length in bytes.
Descriptors = npt.NDArray[np.uint64]


class EventKind(IntEnum):
    """What happened; the fields of :class:`Event` that it fills are named."""

    CONNECTED = 1  #: an outgoing connection is ready (connection; id = the value given to ``connect``)
    ACCEPTED = 2  #: an incoming connection is ready (connection; detail: its peer's address, if it has one)
    CLOSED = 3  #: a connection is gone (connection, status, detail, offset = sent, length = bytes landed)
    MESSAGE = 4  #: a control message arrived (connection, payload)
    SENT = 5  #: a post ended (connection, id = post, status, length = bytes, detail)
    LANDED = 6  #: a chunk landed and held (connection, id = window, offset, length)
    WINDOW_DONE = 7  #: all bytes of a window landed and held (connection, id = window, length)
    WINDOW_FAILED = 8  #: a window can't complete (connection, id = window, status, offset, length, detail)
    TURNED_AWAY = 13  #: somebody who was no peer (status, detail: address and why, length = others untold)


class Status(IntEnum):
    """How something ended."""

    OK = 0
    CANCELLED = 1
    CONNECTION_LOST = 2
    CHECKSUM_MISMATCH = 3
    STALE_GENERATION = 4
    OUT_OF_BOUNDS = 5
    OVERLAP = 6
    PROTOCOL_ERROR = 7
    REFUSED = 8
    IO_ERROR = 9
    BEYOND_END = 10
    SILENT = 11
    NOT_CONVERTED = 12
    FORGED = 13


class Event(NamedTuple):
    """One entry of the completion queue; times are CLOCK_MONOTONIC nanoseconds."""

    kind: int
    connection: int
    id: int
    status: int
    offset: int
    length: int
    time_ns: int
    payload: bytes
    detail: str
    began_ns: int = 0  #: SENT, WINDOW_DONE, WINDOW_FAILED: when the first chunk was cut, or came; 0 if untold

    @property
    def status_name(self) -> str:
        """The status as it is shown to people."""
        return Status(self.status).name.lower()

    @property
    def why(self) -> str:
        """What went wrong: the detail, or the status where there is none."""
        return self.detail or self.status_name


class Capabilities(NamedTuple):
    """What the layer above may rely on; it composes backends by these alone.

    ``rank``: ``backend=auto`` prefers the lowest. ``crosses_nodes``: peers on other machines can be
    reached, at ``NAME://HOST:PORT``; else it listens on ``NAME://``. ``device_memory``: windows and posts may
    lie on a device (``DeviceBackend``), and only then is it of use. ``pages``: its lanes know pages (``PagedBackend``).
    ``parts``: they convert on the way (``ConvertingBackend``). ``protects``: see ``ProtectingBackend``.
    ``mode_changes``: what ``connection_info`` says of mode and reason may change while a connection lives.
    """

    name: str
    rank: int
    crosses_nodes: bool
    device_memory: bool = False
    pages: bool = False
    parts: bool = False
    protects: bool = False
    mode_changes: bool = False


class BackendOptions(NamedTuple):
    """What a user may choose of any backend; 0 and "" stand for the backend's own measured default.

    ``lanes``: data-plane threads; ``direct``: copy straight from and to the peer's pages where possible; ``links``: our
    hosts that peers take lanes over, ``reached_at``: the one they dial; ``local_address``: what connections leave by;
    ``measures``: lanes take times; ``library_…``: of another library, as it names them.
    """

    lanes: int = 0
    chunk_bytes: int = 0
    direct: bool = True
    local_address: str = ""
    reached_at: str = ""
    links: tuple[str, ...] = ()
    measures: bool = True
    library_transport: str = ""
    library_device: str = ""


class ConnectionInfo(NamedTuple):
    """What was found out when a connection was set up."""

    peer: str  #: the peer's address, for people
    mode: str  #: "direct" | "arena" (shm), "stream" (tcp), "rdma", ... for people and reports
    reason: str  #: why this mode and not a better one; empty for the best
    crosses_wire: bool  #: bytes cross a wire or a staging buffer: integrity=auto checksums them
    lanes: int
    local: str = ""  #: this side's own address, HOST:PORT, where it has one


def checked_table(
    array: np.ndarray[tuple[int, ...], np.dtype[np.uint64]], name: str, columns: int
) -> Segments:
    """``array`` as it must come in, C-contiguous. Raises ValueError naming the argument and its shape."""
    if array.ndim != 2 or array.shape[1] != columns or array.dtype != np.uint64:
        raise ValueError(
            f"{name} has shape {array.shape} and dtype {array.dtype}, must have shape (n, {columns}) and dtype uint64"
        )
    return np.ascontiguousarray(array)


@runtime_checkable
class Backend(Protocol):
    """One transport of one process. See the module's text for the contract."""

    @property
    def capabilities(self) -> Capabilities:
        """A class attribute, so that it can be read before a backend is made."""
        ...

    def register_memory(self, address: int, length: int) -> int:
        """Make ``[address, address + length)`` usable in posts and windows; returns a region id.

        Raises ValueError for a zero or overflowing range.
        """
        ...

    def deregister_memory(self, region: int) -> None:
        """Forget a region; ValueError while a post or a window still uses it."""
        ...

    def listen(self, address: str) -> str:
        """Start to accept connections; returns the address that peers connect to.

        Raises OSError when the address can't be bound.
        """
        ...

    def connect(self, address: str, timeout_s: float) -> int:
        """Begin to connect; ends in CONNECTED or CLOSED for the returned connection id."""
        ...

    def authorize(self, connection: int) -> None:
        """The layer above trusts the peer now: lift the limits on unauthenticated peers
        (message size 64 KiB, no data, one lane) and open the remaining lanes."""
        ...

    def connection_info(self, connection: int) -> ConnectionInfo: ...

    def watch(self, connection: int, timeout_s: float) -> None:
        """Close the connection, with CLOSED/SILENT, if its peer gives no sign of life for ``timeout_s`` (until a third
        of it later). Its lanes ask the peer's, so that a peer whose interpreter is busy lives; any bytes from it are
        such a sign. Until ``unwatch``; only of a connection that both sides authorized. An unknown one is ignored.

        Raises ValueError for a time that is not more than 0 and at most a week.
        """
        ...

    def unwatch(self, connection: int) -> None:
        """Whether the peer lives is of no interest (any more): it costs nothing then."""
        ...

    def close_connection(self, connection: int) -> None:
        """End a connection; CLOSED/CANCELLED follows."""
        ...

    def send(self, connection: int, message: bytes) -> None:
        """Queue one control message; in order, whole, before any posted data that still waits.

        Raises ValueError when it is too long, BlockingIOError when the bounded queue is full.
        """
        ...

    def open_window(
        self, connection: int, segments: Segments, generation: int, *, notify_chunks: bool = False
    ) -> int:
        """Let the peer of ``connection`` fill ``segments``; returns a window id, never reused."""
        ...

    def window_descriptor(self, window: int) -> bytes:
        """What the peer needs to post into the window, opaque, at most 1 KiB + 16 bytes a segment."""
        ...

    def close_window(self, window: int) -> int:
        """Stop the window; returns how many bytes had landed. Unknown windows are ignored (0)."""
        ...

    def post(
        self,
        connection: int,
        window_descriptor: bytes,
        descriptors: Descriptors,
        generation: int,
        *,
        priority: int = 0,
        checksum: bool = True,
    ) -> int:
        """Queue bytes for the peer's window; returns a post id, ended by one SENT event.

        Lower ``priority`` goes first; equal ones in order of posting. Adjacent
        descriptors are merged. Only enqueues (a small post on an idle connection may
        be carried out at once). Raises ValueError for memory that is not registered.
        """
        ...

    def cancel(self, post: int) -> None:
        """Revoke a post: what has not left stays here, what the peer is reading now is
        made invalid there. SENT/CANCELLED follows unless it had ended."""
        ...

    def poll(self, max_events: int = 256) -> Sequence[Event]:
        """Take waiting events without blocking."""
        ...

    def wait(self, timeout_s: float) -> bool:
        """Block until an event waits or the time is over, without the GIL; may drive the
        lanes from this thread for some tens of microseconds before it sleeps."""
        ...

    def fileno(self) -> int:
        """An eventfd that is readable while events wait."""
        ...

    def counters(self) -> dict[str, int]:
        """Totals counted in the lanes since the start: bytes, chunks, checksum_failures, ..."""
        ...

    def traffic(self) -> Sequence[tuple[int, int, int]]:
        """Of each connection that is open: its id, bytes sent, bytes landed."""
        ...

    def small_posts(self) -> Sequence[tuple[int, int]]:
        """Small posts by how long they took, in powers of two from 1 µs on: their number, and the sum of their
        nanoseconds."""
        ...

    def close(self) -> None:
        """End every connection, join every thread, free every descriptor. Idempotent."""
        ...
