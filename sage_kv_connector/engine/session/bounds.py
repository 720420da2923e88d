# SPDX-License-Identifier: Apache-2.0
"""What a peer may say: errors that name the field, the value and what is allowed."""

from __future__ import annotations

from collections.abc import Sized

#: Longest texts that are accepted from a peer, in characters.
MAX_TRANSFER_ID = 256
MAX_DETAIL = 4096
#: Transfers that one message renews, so that it fits a backend's longest.
MAX_RENEWED = 512
#: A transfer has at most this many consumers.
MAX_CONSUMERS = 4096
MAX_UINT64 = (1 << 64) - 1


class ProtocolError(Exception):
    """A peer said something that the protocol does not allow here."""


def check_number(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        shown = "2**64 - 1" if high == MAX_UINT64 else str(high)
        raise ProtocolError(f"{name} is {value}, allowed: {low} to {shown}")


def check_length(name: str, value: Sized, low: int, high: int, unit: str = "characters") -> None:
    if not low <= len(value) <= high:
        raise ProtocolError(f"{name} has {len(value)} {unit}, allowed: {low} to {high}")


def check_transfer_id(transfer_id: str) -> None:
    check_length("transfer_id", transfer_id, 1, MAX_TRANSFER_ID)
