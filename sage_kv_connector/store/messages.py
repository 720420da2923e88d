# SPDX-License-Identifier: Apache-2.0
"""Bodies of a store's questions and answers, as docs/protocol.md lists them: MessagePack arrays."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from sage_kv_connector.contract.failure import excerpt
from sage_kv_connector.engine import MAX_TRANSFER_ID

#: A key is any text of at most this many characters; a question names at most this many keys.
MAX_KEY = 256
MAX_KEYS = 512
#: Bytes of one entry, and of all entries of one question.
MAX_ITEM_BYTES = 1 << 40

WHERE, PUT, GET, HELD, CLEAR, STATS = (
    f"store.{verb}" for verb in ("where", "put", "get", "held", "clear", "stats")
)


class BodyError(ValueError):
    """A body is not what its verb wants; the text names the field and what is allowed."""


class Empty(msgspec.Struct, array_like=True, frozen=True):
    """Of questions that need nothing said."""


class Where(msgspec.Struct, array_like=True, frozen=True):
    """Who answers, on which node (``planner.node_id``), and all addresses that reach it."""

    engine_id: str
    node: str
    addresses: tuple[str, ...]


class Put(msgspec.Struct, array_like=True, frozen=True):
    """Keep these: item i of the asker's transfer is the bytes of key i. Answered with ``Flags`` when they landed."""

    transfer_id: str
    keys: tuple[str, ...]
    sizes: tuple[int, ...]
    timeout_ms: int


class Get(msgspec.Struct, array_like=True, frozen=True):
    """Offer what there is of these keys, each of exactly this size. Answered with ``Offered``."""

    keys: tuple[str, ...]
    sizes: tuple[int, ...]


class Offered(msgspec.Struct, array_like=True, frozen=True):
    """Keys with a flag are on offer under this id, one item each in their order; empty if there are none."""

    transfer_id: str
    flags: tuple[bool, ...]


class Held(msgspec.Struct, array_like=True, frozen=True):
    """Which of these keys are there? Answered with ``Flags``."""

    keys: tuple[str, ...]


class Flags(msgspec.Struct, array_like=True, frozen=True):
    """One for each key of the question."""

    flags: tuple[bool, ...]


class Clear(msgspec.Struct, array_like=True, frozen=True):
    """Remove all keys that begin so. Answered with ``Cleared``."""

    prefix: str


class Cleared(msgspec.Struct, array_like=True, frozen=True):
    entries: int


class Stats(msgspec.Struct, frozen=True):
    """Totals since the start but for ``capacity``, ``entries`` and ``held_bytes``, which are of now; sizes in bytes."""

    capacity: int
    entries: int
    held_bytes: int
    put_entries: int
    put_bytes: int
    got_entries: int
    got_bytes: int
    hits: int
    misses: int
    evicted: int
    evicted_bytes: int
    refused: int
    failed_transfers: int


Body = TypeVar("Body", bound=msgspec.Struct)
_encoder = msgspec.msgpack.Encoder()


def encode(body: msgspec.Struct) -> bytes:
    return _encoder.encode(body)


def decode(payload: bytes, kind: type[Body]) -> Body:
    """Decode and bound one body. Raises BodyError."""
    try:
        body = msgspec.msgpack.decode(payload, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # the last: too deep
        raise BodyError(f"{kind.__name__} of {len(payload)} bytes is not valid: {excerpt(error)}") from error
    if isinstance(body, Put | Get | Held):
        check_keys(body.keys)
    if isinstance(body, Put | Get):
        if len(body.sizes) != len(body.keys):
            raise BodyError(f"sizes has {len(body.sizes)} entries, keys has {len(body.keys)}")
        if not all(0 < size <= MAX_ITEM_BYTES for size in body.sizes):
            raise BodyError(f"sizes has one below 1 or above {MAX_ITEM_BYTES}")
    if isinstance(body, Put) and not (0 < len(body.transfer_id) <= MAX_TRANSFER_ID and body.timeout_ms > 0):
        raise BodyError(
            f"transfer_id has {len(body.transfer_id)} characters (allowed: 1 to {MAX_TRANSFER_ID}), "
            f"timeout_ms is {body.timeout_ms} (must be positive)"
        )
    if isinstance(body, Offered) and not any(body.flags) <= len(body.transfer_id) <= MAX_TRANSFER_ID:
        raise BodyError(
            f"transfer_id has {len(body.transfer_id)} characters, allowed: {int(any(body.flags))} to {MAX_TRANSFER_ID}"
        )
    if isinstance(body, Clear) and len(body.prefix) > MAX_KEY:
        raise BodyError(f"prefix has {len(body.prefix)} characters, at most {MAX_KEY} are allowed")
    return body


def check_keys(keys: tuple[str, ...]) -> None:
    """Raises BodyError naming what is wrong with them."""
    if not 0 < len(keys) <= MAX_KEYS:
        raise BodyError(f"keys has {len(keys)} entries, allowed: 1 to {MAX_KEYS}")
    for key in keys:
        if not 0 < len(key) <= MAX_KEY:
            raise BodyError(f"a key has {len(key)} characters, allowed: 1 to {MAX_KEY}")
