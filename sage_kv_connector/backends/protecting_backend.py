# SPDX-License-Identifier: Apache-2.0
"""What a backend with ``Capabilities.protects`` has beside: nobody on the way changes or reads what lanes carry."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

#: Bytes of one direction's keys: of 16 lanes each an AES-128 key of 16 bytes and a nonce's first value of 12.
LANE_KEYS_BYTES = 16 * (16 + 12)


class TrafficKeys(NamedTuple):
    """Of one connection, as this side uses them; each ``LANE_KEYS_BYTES`` long. Never shown."""

    encrypts: bool  #: AES-GCM; else its tag alone, over bytes that anybody can read
    send: bytes
    receive: bytes

    def __repr__(self) -> str:
        return f"TrafficKeys(encrypts={self.encrypts})"


@runtime_checkable
class ProtectingBackend(Protocol):
    """Every frame behind ``protect`` has a tag: messages, data, and what lanes tell each other."""

    def protection_lacks(self) -> str:
        """What this machine has not got for it, for people; "" if nothing."""
        ...

    def protect(self, connection: int, keys: TrafficKeys, last_plain: bytes = b"") -> None:
        """Seal all that leaves, but for messages that were sent before, and believe nothing that is not sealed.

        Both sides between the same two messages, before ``authorize``. A frame that does not hold its tag closes the
        connection, with CLOSED/FORGED. ``last_plain``: a message that still leaves as it is and whose answer is sealed;
        sent by itself it could be answered before the keys are there. An unknown connection is ignored. Raises
        ValueError the second time.
        """
        ...
