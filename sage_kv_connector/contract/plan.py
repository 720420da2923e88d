# SPDX-License-Identifier: Apache-2.0
"""What two peers agreed on, how one transfer is carried out, and what came of it."""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

from sage_kv_connector.contract.chunk import DeviceSpec
from sage_kv_connector.contract.failure import Failure, Stage


class TransportPlan(msgspec.Struct, frozen=True):
    """What a session between two peers settled, once, at its start.

    ``mode`` is how the backend places bytes at that moment ("direct", "arena", "stream");
    ``reason`` says why it is not a better one. ``checksum``: a CRC32C on each chunk; with ``security``
    "authenticated" or "encrypted" a tag stands in its place.
    """

    backend: str
    mode: str
    reason: str
    lanes: int
    checksum: bool
    wire_dtype: str = "same"
    security: str = "none"


class TransferPlan(msgspec.Struct, frozen=True):
    """How one transfer is cut and paced.

    ``prefetch_depth`` is how many chunks ``stream_pipeline`` keeps in flight.
    ``deadline_s``: after that the transfer fails. ``peer`` is where the chunks go
    (``direction`` "send") or come from ("recv").
    """

    peer: DeviceSpec = DeviceSpec()
    direction: Literal["send", "recv"] = "send"
    prefetch_depth: int = 4
    deadline_s: float = 120.0


class TransferStats(msgspec.Struct, frozen=True):
    """One transfer or chunk that ended well. Times in seconds, on this side's clock.

    ``nbytes`` are those that crossed; ``wire_dtype`` is "same" where pages went as they are. ``mode`` is the session's
    (``TransportPlan``), but over a backend of devices: "read" where kernels of the receiver read the sender's pages in
    place and converted them, "staged" where they were converted by way of host memory.

    ``peer``: who sent it, or took it last; several with commas. ``checksum`` and ``security``: as in ``TransportPlan``.

    ``wait_s`` runs from the call to the peer's readiness (its subscription, or its
    first byte), ``transfer_s`` from there to the last byte.
    """

    transfer_id: str
    nbytes: int
    wait_s: float
    transfer_s: float
    backend: str
    mode: str
    checksum: bool
    wire_dtype: str = "same"
    peer: str = ""
    security: str = "none"

    @property
    def gbytes_per_s(self) -> float:
        return self.nbytes / self.transfer_s / 1e9 if self.transfer_s > 0 else 0.0


class Outcome(NamedTuple):
    """How a transfer ended: ``stats`` if every byte landed and held, else ``failure`` says why not.

    On the producer neither is there when no consumer needed anything of it. ``stages``: where its time went,
    in order, in seconds; empty where it was not begun.
    """

    transfer_id: str
    stats: TransferStats | None = None
    failure: Failure | None = None
    stages: tuple[tuple[str, float], ...] = ()

    @property
    def ok(self) -> bool:
        return self.stats is not None

    @property
    def unneeded(self) -> bool:
        """Nothing moved, and nothing went wrong: nobody needed it."""
        return self.stats is None and self.failure is None

    @property
    def aborted(self) -> bool:
        """It ended because somebody here wanted it so."""
        return self.failure is not None and self.failure.aborted

    @property
    def reached(self) -> bool:
        """False if there never was a session with the peer, so it knows nothing of this."""
        return self.failure is None or self.failure.stage not in (Stage.RESOLVE, Stage.CONNECT)

    @property
    def error(self) -> str:
        """Code and detail of a failure, "" if there is none."""
        return "" if self.failure is None else str(self.failure.reason)


class TransferReport(msgspec.Struct, frozen=True):
    """What ``stream_pipeline`` moved: the chunks' stats and the time of the whole."""

    stats: tuple[TransferStats, ...]
    nbytes: int
    elapsed_s: float

    @property
    def gbytes_per_s(self) -> float:
        return self.nbytes / self.elapsed_s / 1e9 if self.elapsed_s > 0 else 0.0
