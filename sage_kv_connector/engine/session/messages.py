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

PROTOCOL_VERSION = 9

NONCE_BYTES = 32
#: Of who says hello: its name in characters, its rank, and the versions it knows.
MAX_ENGINE_ID, MAX_RANK, MAX_VERSIONS = 256, (1 << 31) - 1, 64
#: An X25519 public key.
SHARE_BYTES = 32
#: Secrets that are accepted at a time.
MAX_SECRETS = 2
#: Characters of an address that a peer names.
MAX_ADDRESS = 256
#: A question's verb in characters; a body in bytes, so that it fits a backend's message of 1 MiB with its envelope.
MAX_VERB = 64
MAX_BODY = (1 << 20) - (32 << 10)

__all__ = [
    "MAX_BODY",
    "MAX_DETAIL",
    "MAX_RENEWED",
    "MAX_SECRETS",
    "MAX_TRANSFER_ID",
    "MAX_VERB",
    "PROTOCOL_VERSION",
    "SHARE_BYTES",
    "Answer",
    "Ask",
    "Cancel",
    "Challenge",
    "Failed",
    "Grant",
    "Hello",
    "Message",
    "PageRuns",
    "PartGroup",
    "PartsReady",
    "Proof",
    "ProtocolError",
    "Reject",
    "Release",
    "Renew",
    "Subscribe",
    "SubscribeParts",
    "Welcome",
    "decode",
    "encode",
]  # fmt: skip


class Hello(msgspec.Struct, tag="hello", array_like=True, frozen=True):
    """Connector → acceptor, first. ``want`` is the engine it means to reach ("" = any), ``share`` its X25519 public
    key, ``address`` what it dialled, and ``security`` how it would have the connection protected.

    What version 7 did not have is not there in its hello, so that it is told about the version.
    """

    versions: tuple[int, ...]
    engine_id: str
    rank: int
    nonce: bytes
    want: str = ""
    share: bytes = bytes(SHARE_BYTES)
    address: str = ""
    security: str = "none"

    def check(self) -> None:
        check_length("versions", self.versions, 1, MAX_VERSIONS, "entries")
        check_length("want", self.want, 0, MAX_ENGINE_ID)
        _check_side(self)


class Challenge(msgspec.Struct, tag="challenge", array_like=True, frozen=True):
    """Acceptor → connector: its own nonce and share, ``address``, where the hello came from as it sees that, and a
    proof that it knows the secret for each that it accepts."""

    version: int
    engine_id: str
    rank: int
    nonce: bytes
    share: bytes
    address: str
    proofs: tuple[bytes, ...]

    def check(self) -> None:
        _check_side(self)
        check_length("proofs", self.proofs, 1, MAX_SECRETS, "proofs")


def _check_side(said: Hello | Challenge) -> None:
    """What both sides say of themselves."""
    check_length("engine_id", said.engine_id, 0, MAX_ENGINE_ID)
    check_number("rank", said.rank, 0, MAX_RANK)
    _check_bytes("nonce", said.nonce, NONCE_BYTES)
    _check_bytes("share", said.share, SHARE_BYTES)
    check_length("address", said.address, 0, MAX_ADDRESS)


def _check_bytes(name: str, value: bytes, size: int) -> None:
    if len(value) != size:
        raise ProtocolError(f"{name} has {len(value)} bytes, must have {size}")


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
