# SPDX-License-Identifier: Apache-2.0
"""Control messages of a session, as docs/protocol.md specifies them: MessagePack arrays, tag first."""

from __future__ import annotations

import msgspec

from sage_kv_connector.format.wire_format import WireFormat

PROTOCOL_VERSION = 3

#: Longest texts that are accepted from a peer, in characters and bytes.
MAX_TRANSFER_ID = 256
MAX_DETAIL = 4096
NONCE_BYTES = 32
#: A subscription names at most this many page runs over all groups.
MAX_PAGE_RUNS = 1 << 16
#: A converted part has at most this many bytes and tokens, a transfer at most this many consumers.
MAX_PART_BYTES = 16 << 20
MAX_PART_TOKENS = 1 << 16
MAX_READERS = 4096
#: A question's verb in characters; a body in bytes, so that it fits a backend's message of 1 MiB with its envelope.
MAX_VERB = 64
MAX_BODY = (1 << 20) - (32 << 10)


class ProtocolError(Exception):
    """A peer said something that the protocol does not allow here."""


class Hello(msgspec.Struct, tag="hello", array_like=True, frozen=True):
    """Connector → acceptor, first. ``want`` is the engine it means to reach ("" = any)."""

    versions: tuple[int, ...]
    engine_id: str
    rank: int
    nonce: bytes
    want: str = ""


class Challenge(msgspec.Struct, tag="challenge", array_like=True, frozen=True):
    """Acceptor → connector: its own nonce, and proof that it knows the secret."""

    version: int
    engine_id: str
    rank: int
    nonce: bytes
    proof: bytes


class Proof(msgspec.Struct, tag="proof", array_like=True, frozen=True):
    """Connector → acceptor: proof, and its schema (MessagePack of KVCacheSchema, or empty)."""

    proof: bytes
    schema: bytes


class Welcome(msgspec.Struct, tag="welcome", array_like=True, frozen=True):
    """Acceptor → connector: the session is open."""

    proof: bytes
    schema: bytes


class Reject(msgspec.Struct, tag="reject", array_like=True, frozen=True):
    """Either way, then the connection ends. ``code`` is one of docs/protocol.md's."""

    code: str
    detail: str


class PageRuns(msgspec.Struct, array_like=True, frozen=True):
    """Pages of one kv group by their place in the request: (first, count) runs, ascending."""

    group: int
    runs: tuple[tuple[int, int], ...]

    @property
    def pages(self) -> int:
        return sum(count for _, count in self.runs)


class Subscribe(msgspec.Struct, tag="subscribe", array_like=True, frozen=True):
    """Consumer → producer: stream these pages of this transfer into my window.

    An empty ``selection`` means everything that the producer offers under that id.
    ``finished``: the consumer knows that prefill is over, so an unknown id is an error at once.
    ``readers``: so many consumers read this transfer from this producer.
    """

    transfer_id: str
    generation: int
    window: bytes
    nbytes: int
    selection: tuple[PageRuns, ...]
    checksum: bool
    finished: bool
    timeout_ms: int
    readers: int = 1


class SubscribePart(msgspec.Struct, tag="subscribe_part", array_like=True, frozen=True):
    """Consumer → producer: convert this box of KV to these formats and stream it into my window.

    ``group`` and the layers are the producer's, heads count over the whole model, tokens from the
    request's first. ``formats``: one for each canonical plane of the group. All parts of one
    consumer carry the same ``reader``; ``last`` marks its last one. ``readers``: so many
    consumers read this transfer from this producer.
    """

    transfer_id: str
    generation: int
    window: bytes
    nbytes: int
    group: int
    first_layer: int
    layers: int
    first_head: int
    heads: int
    first_token: int
    tokens: int
    formats: tuple[WireFormat, ...]
    reader: int
    readers: int
    last: bool
    checksum: bool
    finished: bool
    timeout_ms: int


class Failed(msgspec.Struct, tag="failed", array_like=True, frozen=True):
    """Producer → consumer: this subscription won't complete."""

    transfer_id: str
    generation: int
    code: str
    detail: str


class Cancel(msgspec.Struct, tag="cancel", array_like=True, frozen=True):
    """Consumer → producer: stop this subscription, or all parts of this reader; its windows are closed."""

    transfer_id: str
    reader: int


class Release(msgspec.Struct, tag="release", array_like=True, frozen=True):
    """Consumer → producer: this consumer, one of ``readers``, wants nothing of this transfer (any more).

    ``detail``: why it gave up what it needed; empty if it never needed it.
    """

    transfer_id: str
    readers: int = 1
    detail: str = ""


class Renew(msgspec.Struct, tag="renew", array_like=True, frozen=True):
    """Consumer → producer: keep these transfers' pages for another lease."""

    transfer_ids: tuple[str, ...]


class Ask(msgspec.Struct, tag="ask", array_like=True, frozen=True):
    """Either way: a question to whatever serves ``verb`` there. ``number`` is the asker's own."""

    number: int
    verb: str
    body: bytes


class Answer(msgspec.Struct, tag="answer", array_like=True, frozen=True):
    """To the Ask with this number; an empty ``code`` means that ``body`` is the answer."""

    number: int
    code: str
    detail: str
    body: bytes


class Ping(msgspec.Struct, tag="ping", array_like=True, frozen=True):
    """Either way, while something is in flight."""

    sequence: int


class Pong(msgspec.Struct, tag="pong", array_like=True, frozen=True):
    """Answer to a Ping with the same number."""

    sequence: int


Message = (
    Hello
    | Challenge
    | Proof
    | Welcome
    | Reject
    | Subscribe
    | SubscribePart
    | Failed
    | Cancel
    | Release
    | Renew
    | Ask
    | Answer
    | Ping
    | Pong
)

_decoder = msgspec.msgpack.Decoder(Message)
_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(payload: bytes) -> Message:
    """Decode and bound one message. Raises ProtocolError saying what is wrong with it."""
    try:
        message: Message = _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"message of {len(payload)} bytes is not valid: {error}") from error
    _check(message)
    return message


def _check(message: Message) -> None:
    match message:
        case Hello(nonce=nonce) | Challenge(nonce=nonce) if len(nonce) != NONCE_BYTES:
            raise ProtocolError(f"nonce has {len(nonce)} bytes, must have {NONCE_BYTES}")
        case Subscribe():
            _check_subscribe(message)
            _check_selection(message)
        case SubscribePart():
            _check_subscribe(message)
            _check_part(message)
        case Failed(transfer_id=tid) | Cancel(transfer_id=tid) | Release(transfer_id=tid):
            _check_transfer_id(tid)
        case Renew(transfer_ids=ids):
            for tid in ids:
                _check_transfer_id(tid)
        case Ask(verb=verb):
            _check_length("verb", verb, 1, MAX_VERB)
            _check_question(message)
        case Answer(code=code):
            _check_length("code", code, 0, MAX_VERB)
            _check_question(message)
    detail = getattr(message, "detail", "")
    if len(detail) > MAX_DETAIL:
        raise ProtocolError(f"detail has {len(detail)} characters, at most {MAX_DETAIL} are allowed")


def _check_length(name: str, text: str, low: int, high: int) -> None:
    if not low <= len(text) <= high:
        raise ProtocolError(f"{name} has {len(text)} characters, allowed: {low} to {high}")


def _check_question(message: Ask | Answer) -> None:
    if not 0 < message.number < 1 << 64:
        raise ProtocolError(f"number is {message.number}, allowed: 1 to 2**64 - 1")
    if len(message.body) > MAX_BODY:
        raise ProtocolError(f"body has {len(message.body)} bytes, at most {MAX_BODY} are allowed")


def _check_transfer_id(transfer_id: str) -> None:
    if not 0 < len(transfer_id) <= MAX_TRANSFER_ID:
        raise ProtocolError(f"transfer_id has {len(transfer_id)} characters, allowed: 1 to {MAX_TRANSFER_ID}")


def _check_subscribe(message: Subscribe | SubscribePart) -> None:
    _check_transfer_id(message.transfer_id)
    if not 0 < message.generation < 1 << 64:
        raise ProtocolError(f"generation is {message.generation}, allowed: 1 to 2**64 - 1")
    if message.nbytes <= 0 or message.timeout_ms <= 0:
        raise ProtocolError(
            f"nbytes is {message.nbytes} and timeout_ms {message.timeout_ms}, both must be positive"
        )
    if not 1 <= message.readers <= MAX_READERS:
        raise ProtocolError(f"readers is {message.readers}, allowed: 1 to {MAX_READERS}")


def _check_selection(message: Subscribe) -> None:
    if sum(len(part.runs) for part in message.selection) > MAX_PAGE_RUNS:
        raise ProtocolError(f"selection has more than {MAX_PAGE_RUNS} page runs")
    seen: set[int] = set()
    for part in message.selection:
        if part.group < 0 or part.group in seen:
            raise ProtocolError(f"selection names group {part.group} twice or below 0")
        seen.add(part.group)
        end = 0
        for first, count in part.runs:
            if first < end or count <= 0 or first + count > 1 << 40:
                raise ProtocolError(
                    f"selection of group {part.group}: run ({first}, {count}) is empty, out of order or too far"
                )
            end = first + count


def _check_part(message: SubscribePart) -> None:
    for name, low, high in (
        ("group", 0, 1 << 16),
        ("first_layer", 0, 1 << 16),
        ("layers", 1, 1 << 16),
        ("first_head", 0, 1 << 16),
        ("heads", 1, 1 << 16),
        ("first_token", 0, 1 << 40),
        ("tokens", 1, MAX_PART_TOKENS),
        ("nbytes", 1, MAX_PART_BYTES),
        ("reader", 1, (1 << 64) - 1),
        ("readers", 1, MAX_READERS),
    ):
        value = getattr(message, name)
        if not low <= value <= high:
            raise ProtocolError(f"{name} is {value}, allowed: {low} to {high}")
    if not 1 <= len(message.formats) <= 16:
        raise ProtocolError(f"formats has {len(message.formats)} entries, allowed: 1 to 16")
