# SPDX-License-Identifier: Apache-2.0
"""What a transfer library must do for us: read memory of a peer's process.

Memory model
------------
Peers read what ``register`` was called for. Here they are read into slots of one arena, registered once. A page is
written by our lanes alone, from a slot whose read ended well: what a library still writes late, after an error or
when nobody waits any more, lands in a slot.

Life of a library
-----------------
Made with its backend -> ``register`` -> ``description`` -> for each peer ``meet``, as often as that one describes
itself again -> reads -> ``forget`` -> ``close``.

Implementor's contract
----------------------
* ``begin`` and ``has_ended`` come from one thread, ``meet`` and ``forget`` too; ``register``, ``deregister`` and
  ``description`` from any, and never two calls at a time.
* No call blocks for longer than the library needs to begin; a library that can only wait does so in ``begin``.
* What fails raises ``LibraryError`` with what it is and, where there is something, what to do.
* A read that failed, or ``close``, may leave bytes under way that still land in slots: ``close`` says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

#: uint64 array of shape (n, 3): address here, the peer's address, bytes.
Rows = npt.NDArray[np.uint64]


RDMA_DEVICES = Path("/sys/class/infiniband")


class LibraryError(Exception):
    """A library refused or failed; the text says what, for people."""


class LibrarySettings(NamedTuple):
    """What a user may choose of a library; "" stands for its own choice.

    ``host``: at which peers reach this process; ``transport`` and ``device``: as the library names them.
    """

    host: str = ""
    transport: str = ""
    device: str = ""


class Library(Protocol):
    """One process's use of it."""

    def register(self, address: int, length: int) -> None:
        """Host memory that reads may fill and peers may read. Raises LibraryError."""
        ...

    def deregister(self, address: int, length: int) -> None:
        """Of what was registered."""
        ...

    def description(self) -> bytes:
        """What a peer's ``meet`` needs, of all that is registered now; at most 1 MiB."""
        ...

    def meet(self, connection: int, description: bytes) -> None:
        """A peer can be read from now on. ``description`` is its own, which it may have sent before.

        Raises LibraryError.
        """
        ...

    def forget(self, connection: int) -> None:
        """Nothing more is read of that peer. Unknown ones are ignored."""
        ...

    def begin(self, connection: int, rows: Rows) -> object:
        """Read; the answer is for ``has_ended``. Raises LibraryError."""
        ...

    def has_ended(self, read: object) -> bool:
        """Whether all bytes are here. Raises LibraryError when the read failed; then, or once True, it is over."""
        ...

    def close(self) -> None:
        """No read is under way."""
        ...


class LibraryClass(Protocol):
    """What makes libraries."""

    def __call__(self, settings: LibrarySettings) -> Library:
        """Raises LibraryError where it does not start with these."""
        ...

    def lacks(self) -> str:
        """Why this machine can't have it, "" if it can."""
        ...


def rdma_devices() -> list[str]:
    """Names of this machine's RDMA network cards, as the kernel knows them."""
    return sorted(one.name for one in RDMA_DEVICES.iterdir()) if RDMA_DEVICES.is_dir() else []
