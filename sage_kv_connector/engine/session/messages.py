# SPDX-License-Identifier: Apache-2.0
"""Control messages of a session, as docs/protocol.md specifies them: MessagePack arrays, tag first.

Each message has its own bounds beside it (``check``); ``decode`` gives only what keeps them.
"""

from __future__ import annotations

import msgspec

from sage_kv_connector.contract.failure import excerpt
from sage_kv_connector.engine.session.bounds import (
    MAX_DETAIL,
    MAX_RENEWED,
    MAX_TRANSFER_ID,
    MAX_UINT64,
    ProtocolError,
    check_length,
    check_number,
)
from sage_kv_connector.engine.session.transfer_messages import (
    Cancel,
    Failed,
    Grant,
    PageRuns,
    PartGroup,
    PartsReady,
    Release,
    Renew,
    Subscribe,
    SubscribeParts,
)

PROTOCOL_VERSION = 7

NONCE_BYTES = 32
#: Of who says hello: its name in characters, its rank, and the versions it knows.
MAX_ENGINE_ID, MAX_RANK, MAX_VERSIONS = 256, (1 << 31) - 1, 64
#: A question's verb in characters; a body in bytes, so that it fits a backend's message of 1 MiB with its envelope.
MAX_VERB = 64
MAX_BODY = (1 << 20) - (32 << 10)

__all__ = [
    "MAX_BODY", "MAX_DETAIL", "MAX_RENEWED", "MAX_TRANSFER_ID", "MAX_VERB", "PROTOCOL_VERSION",
    "Answer", "Ask", "Cancel", "Challenge", "Failed", "Grant", "Hello", "Message", "PageRuns", "PartGroup",
    "PartsReady", "Proof", "ProtocolError", "Reject", "Release", "Renew", "Subscribe", "SubscribeParts", "Welcome",
    "decode", "encode",
]  # fmt: skip


class Hello(msgspec.Struct, tag="hello", array_like=True, frozen=True):
    """Connector → acceptor, first. ``want`` is the engine it means to reach ("" = any)."""

    versions: tuple[int, ...]
    engine_id: str
    rank: int
    nonce: bytes
    want: str = ""

    def check(self) -> None:
        check_length("versions", self.versions, 1, MAX_VERSIONS, "entries")
        check_length("want", self.want, 0, MAX_ENGINE_ID)
        _check_side(self.engine_id, self.rank, self.nonce)


class Challenge(msgspec.Struct, tag="challenge", array_like=True, frozen=True):
    """Acceptor → connector: its own nonce, and proof that it knows the secret."""

    version: int
    engine_id: str
    rank: int
    nonce: bytes
    proof: bytes

    def check(self) -> None:
        _check_side(self.engine_id, self.rank, self.nonce)


def _check_side(engine_id: str, rank: int, nonce: bytes) -> None:
    check_length("engine_id", engine_id, 0, MAX_ENGINE_ID)
    check_number("rank", rank, 0, MAX_RANK)
    if len(nonce) != NONCE_BYTES:
        raise ProtocolError(f"nonce has {len(nonce)} bytes, must have {NONCE_BYTES}")


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


class Ask(msgspec.Struct, tag="ask", array_like=True, frozen=True):
    """Either way: a question to whatever serves ``verb`` there. ``number`` is the asker's own."""

    number: int
    verb: str
    body: bytes

    def check(self) -> None:
        check_length("verb", self.verb, 1, MAX_VERB)
        _check_question(self.number, self.body)


class Answer(msgspec.Struct, tag="answer", array_like=True, frozen=True):
    """To the Ask with this number; an empty ``code`` means that ``body`` is the answer."""

    number: int
    code: str
    detail: str
    body: bytes

    def check(self) -> None:
        check_length("code", self.code, 0, MAX_VERB)
        _check_question(self.number, self.body)


def _check_question(number: int, body: bytes) -> None:
    check_number("number", number, 1, MAX_UINT64)
    if len(body) > MAX_BODY:
        raise ProtocolError(f"body has {len(body)} bytes, at most {MAX_BODY} are allowed")


Message = (
    Hello
    | Challenge
    | Proof
    | Welcome
    | Reject
    | Subscribe
    | SubscribeParts
    | PartsReady
    | Grant
    | Failed
    | Cancel
    | Release
    | Renew
    | Ask
    | Answer
)

_decoder = msgspec.msgpack.Decoder(Message)
_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(payload: bytes) -> Message:
    """Decode and bound one message. Raises ProtocolError saying what is wrong with it."""
    try:
        message: Message = _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # the last: too deep
        raise ProtocolError(f"message of {len(payload)} bytes is not valid: {excerpt(error)}") from error
    if not isinstance(message, Proof | Welcome | Reject):
        message.check()
    detail = getattr(message, "detail", "")
    if len(detail) > MAX_DETAIL:
        raise ProtocolError(f"detail has {len(detail)} characters, at most {MAX_DETAIL} are allowed")
    return message
