# SPDX-License-Identifier: Apache-2.0
"""How SGLang names a request that goes from prefill to decode: a bootstrap server, and a room there.

vLLM's side takes the same three names in ``kv_transfer_params``, so that a request can begin in one
engine and go on in the other. A room has two transfers: its KV pages and, beside them, the metadata
that decode needs to go on (``MetadataKind``).
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NamedTuple

from sage_kv_connector.contract.peer import bracket

#: SGLang keeps rooms in 64-bit integers; 0 stands for "nothing written yet" in its metadata.
MAX_ROOM = (1 << 63) - 1


class MetadataKind(StrEnum):
    """What a prefill engine offers beside the pages of a room."""

    #: SGLang's own row of metadata buffers.
    SGLANG_ROW = "sglang_row"
    #: The first generated token as one little-endian int64: all that an engine without SGLang's buffers knows.
    FIRST_TOKEN = "first_token"


class BootstrapRoom(NamedTuple):
    """One request. ``url`` is that of the bootstrap server, empty where only the room is known."""

    url: str
    room: int


def new_room() -> int:
    """A room that no other request has."""
    return secrets.randbits(62) | 1


#: Between the rooms of one request's samples: a multiple of 1 to 16, as data parallel ranks go by room % ranks.
_STEP = 720720 * 1_000_003
#: Rooms that are remembered; a router takes new ones at random.
MAX_ROOMS = 1 << 16


class RoomUses:
    """SGLang sends all samples of a request (``n``) to one room: each use gets a room of its own.

    Prefill and decode see the uses of a room in the same order and have the same prompt in all of them, so both
    sides count alike.
    """

    def __init__(self) -> None:
        self._uses: OrderedDict[int, int] = OrderedDict()

    def next(self, room: int) -> int:
        """The room for the next use of this one: itself the first time."""
        uses = self._uses.pop(room, 0)
        self._uses[room] = uses + 1
        if len(self._uses) > MAX_ROOMS:
            self._uses.popitem(last=False)
        apart = uses * _STEP
        return room + apart if room + apart <= MAX_ROOM else room - apart


#: Of the transfer ids of a room: how they begin, and how that ends of what is offered beside its pages.
_ROOM, _BESIDE = "sglang-", "-aux"


def pages_transfer(room: int) -> str:
    """The transfer id of a room's pages."""
    return f"{_ROOM}{room}"


def metadata_transfer(pages: str) -> str:
    """The transfer id of what is offered beside the pages ``pages``."""
    return f"{pages}{_BESIDE}"


def pages_of(transfer_id: str) -> str:
    """The transfer id of a room's pages, also of what is offered beside them; any other id as it is."""
    return transfer_id.removesuffix(_BESIDE) if transfer_id.startswith(_ROOM) else transfer_id


def parse_room(params: Mapping[str, Any], *, on_decode: bool) -> BootstrapRoom | None:
    """``bootstrap_room`` and, on decode, where its server is; None where no room is named.

    Raises ValueError naming the field that can't be used.
    """
    room = params.get("bootstrap_room")
    if room is None:
        return None
    if not isinstance(room, int) or isinstance(room, bool) or not 0 < room <= MAX_ROOM:
        raise ValueError(f"bootstrap_room is {room!r}, allowed: 1 to {MAX_ROOM}")
    if not on_decode:
        return BootstrapRoom("", room)
    host, port = params.get("bootstrap_host"), params.get("bootstrap_port")
    if not isinstance(host, str) or not host:
        raise ValueError(f"bootstrap_host is {host!r}, must be the host of prefill's bootstrap server")
    if not isinstance(port, int) or isinstance(port, bool) or not 0 < port < 1 << 16:
        raise ValueError(f"bootstrap_port is {port!r}, allowed: 1 to 65535")
    return BootstrapRoom(f"http://{bracket(host)}:{port}", room)
