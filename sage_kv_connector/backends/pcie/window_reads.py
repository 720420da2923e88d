# SPDX-License-Identifier: Apache-2.0
"""A window that this device's kernels fill: they read the sender's memory where it lies, and nothing is copied.

Its bytes are the sender's as they lie there; what is made of them, and where that goes, is known to ``read`` alone. So
an offer is held until the whole window is done: a kernel may need bytes of several.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from sage_kv_connector.backends.base import Status
from sage_kv_connector.backends.device_backend import Read
from sage_kv_connector.backends.pcie import messages as pm
from sage_kv_connector.backends.pcie.window_copies import Claims, Incoming
from sage_kv_connector.devices.runtime import Launch


class CannotRead(ValueError):
    """What was offered can't be read by kernels."""


class ReadWindow:
    def __init__(self, connection: int, size: int, generation: int, read: Read) -> None:
        self.connection, self.generation = connection, generation
        self.jobs: set[int] = set()
        self.offers: list[pm.Offered] = []  #: not answered yet
        self.ended = self.revoked = False
        self.status, self.detail = Status.OK, ""
        self._claims = Claims(size)
        self._read = read

    @property
    def size(self) -> int:
        return self._claims.size

    @property
    def landed(self) -> int:
        """Bytes that were offered: kernels may have written what they made of them."""
        return self._claims.claimed

    @property
    def complete(self) -> bool:
        """Nothing more is to come."""
        return self.landed == self.size

    def works(self, offer: pm.Offered, incoming: Incoming) -> list[Sequence[Launch]]:
        """What to launch now, each a job.

        Raises ValueError as ``Claims.take``, CannotRead for what ``read`` refuses.
        """
        self.offers.append(msgspec.structs.replace(offer, table=b"", handles=(), sizes=()))
        taken = self._claims.take(incoming)
        try:
            return self._read(taken)
        except ValueError as error:
            raise CannotRead(str(error)) from error

    def holds(self, post: int) -> bool:
        return any(offer.post == post for offer in self.offers)

    def answers(self) -> list[tuple[pm.Offered, Status, str]]:
        """How its offers ended, once no kernel reads their memory any more; each is told once."""
        status, detail = self.status, self.detail
        if status == Status.OK and (self.revoked or not self.complete):
            status = Status.CANCELLED
        told = [(offer, status, detail) for offer in self.offers]
        self.offers.clear()
        return told
