# SPDX-License-Identifier: Apache-2.0
"""The sender's half: posts of device memory, offered in parts, until the receiver said how each ended."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from sage_kv_connector.backends.base import Descriptors, EventKind, Status
from sage_kv_connector.backends.pcie import messages as pm
from sage_kv_connector.backends.pcie.incoming import Emit, Tell
from sage_kv_connector.backends.pcie.ipc_memory import IpcMemory


class _Post:
    __slots__ = ("connection", "detail", "length", "open_parts", "status")

    def __init__(self, connection: int, length: int, parts: int) -> None:
        self.connection, self.length = connection, length
        self.open_parts = set(range(parts))
        self.status, self.detail = Status.OK, ""


class Outgoing:
    """Any thread posts and cancels; the rest is ``poll``'s."""

    def __init__(self, memory: IpcMemory, ids: Iterator[int], emit: Emit, tell: Tell) -> None:
        self._memory = memory
        self._ids = ids
        self._emit, self._tell = emit, tell
        self._lock = threading.Lock()
        self._posts: dict[int, _Post] = {}

    def post(
        self, connection: int, process: int, window: int, descriptors: Descriptors, generation: int
    ) -> tuple[int, list[pm.Offered]]:
        """A new post, and what to send for it. ``process``: the receiver's, by which its handles are named.

        Raises ValueError for memory that is not registered, for no bytes and for generation 0, DeviceError when it
        can't be exported.
        """
        if generation == 0:
            raise ValueError("generation must not be 0")
        descriptors = descriptors[descriptors[:, 2] > 0]
        if not len(descriptors):
            raise ValueError("descriptors hold no bytes")
        parts = [descriptors[at : at + pm.MAX_COPIES] for at in range(0, len(descriptors), pm.MAX_COPIES)]
        with self._lock:
            exported = [self._memory.export(part, process) for part in parts]
            post = next(self._ids)
            self._posts[post] = _Post(connection, int(descriptors[:, 2].sum()), len(parts))
        return post, [
            pm.Offered(post, number, window, generation, handles, sizes, table)
            for number, (handles, sizes, table) in enumerate(exported)
        ]

    def cancel(self, post: int) -> None:
        with self._lock:
            known = self._posts.get(post)
            if known is None:
                return
            known.status = Status.CANCELLED
        self._tell(known.connection, pm.Revoked(post))

    def on_taken(self, connection: int, taken: pm.Taken) -> None:
        """Raises PcieProtocolError for a part that is not under way."""
        post = self._posts.get(taken.post)
        if post is None or post.connection != connection or taken.part not in post.open_parts:
            raise pm.PcieProtocolError(f"part {taken.part} of post {taken.post} is not under way")
        post.open_parts.discard(taken.part)
        if taken.status not in set(Status):
            raise pm.PcieProtocolError(f"status is {taken.status}")
        if taken.status != Status.OK and post.status == Status.OK:
            post.status, post.detail = Status(taken.status), taken.detail[: pm.MAX_DETAIL]
        if not post.open_parts:
            self._sent(taken.post, post.status, post.detail)

    def on_lost(self, connection: int, detail: str) -> None:
        with self._lock:
            lost = [post for post, one in self._posts.items() if one.connection == connection]
        for post in lost:
            self._sent(post, Status.CONNECTION_LOST, detail)

    def _sent(self, post: int, status: Status, detail: str) -> None:
        with self._lock:
            known = self._posts.pop(post)
        length = known.length if status == Status.OK else 0
        self._emit(EventKind.SENT, known.connection, post, status, length, detail)
