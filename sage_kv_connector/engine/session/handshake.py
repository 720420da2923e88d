# SPDX-License-Identifier: Apache-2.0
"""Mutual proof of the shared secret, bound to every byte of the handshake so far.

Neither side sends the secret. Each proof is an HMAC-SHA256 over a label and the
exact messages exchanged before it, so that a proof can't be reused in another
role, session or with other parameters. No I/O here: bytes in, bytes out.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import NamedTuple

import msgspec

from sage_kv_connector.contract.failure import Code, excerpt
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.engine.session.messages import (
    NONCE_BYTES,
    PROTOCOL_VERSION,
    Challenge,
    Hello,
    Proof,
    ProtocolError,
    Welcome,
    encode,
)

_schema_decoder = msgspec.msgpack.Decoder(KVCacheSchema)


class Identity(NamedTuple):
    """Who this side is, and what it proves."""

    engine_id: str
    rank: int
    secret: bytes
    schema: KVCacheSchema | None


class Peer(NamedTuple):
    """Who the other side proved to be."""

    engine_id: str
    rank: int
    schema: KVCacheSchema | None


class HandshakeRefused(Exception):
    """The handshake can't go on; ``code`` goes to the peer in a Reject."""

    def __init__(self, code: Code, detail: str) -> None:
        super().__init__(detail)
        self.code = code


def _mac(secret: bytes, label: bytes, *parts: bytes) -> bytes:
    mac = hmac.new(secret, b"sage-kvt/1 " + label, hashlib.sha256)
    for part in parts:
        mac.update(len(part).to_bytes(8, "little"))
        mac.update(part)
    return mac.digest()


def _encode_schema(schema: KVCacheSchema | None) -> bytes:
    return msgspec.msgpack.encode(schema) if schema is not None else b""


def decode_schema(data: bytes) -> KVCacheSchema | None:
    """A peer's, None where it has none. Raises ProtocolError."""
    if not data:
        return None
    try:
        return _schema_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"schema is not valid: {excerpt(error)}") from error


class ConnectorHandshake:
    """The connecting side: ``hello`` → on_challenge → on_welcome."""

    def __init__(self, identity: Identity, want: str) -> None:
        self._identity = identity
        self._want = want
        self.hello = encode(
            Hello(
                versions=(PROTOCOL_VERSION,),
                engine_id=identity.engine_id,
                rank=identity.rank,
                nonce=secrets.token_bytes(NONCE_BYTES),
                want=want,
            )
        )
        self._challenge: Challenge | None = None
        self._transcript: tuple[bytes, ...] = ()

    def on_challenge(self, challenge: Challenge, raw: bytes) -> bytes:
        """Check the acceptor's proof; returns the Proof message to send."""
        if self._challenge is not None:
            raise ProtocolError("a second challenge in one handshake")
        unsigned = encode(_without_proof(challenge))
        expected = _mac(self._identity.secret, b"acceptor", self.hello, unsigned)
        if not hmac.compare_digest(expected, challenge.proof):
            raise HandshakeRefused(
                Code.BAD_SECRET, "the peer does not know our shared secret (secret differs)"
            )
        if challenge.version != PROTOCOL_VERSION:
            raise HandshakeRefused(
                Code.VERSION, f"protocol version: {PROTOCOL_VERSION} here, {challenge.version} at the peer"
            )
        self._challenge = challenge
        schema = _encode_schema(self._identity.schema)
        proof = encode(Proof(_mac(self._identity.secret, b"connector", self.hello, raw, schema), schema))
        self._transcript = (self.hello, raw, proof)
        return proof

    def on_welcome(self, welcome: Welcome) -> Peer:
        if self._challenge is None:
            raise ProtocolError("a welcome before the challenge")
        expected = _mac(self._identity.secret, b"welcome", *self._transcript, welcome.schema)
        if not hmac.compare_digest(expected, welcome.proof):
            raise HandshakeRefused(Code.BAD_SECRET, "the peer's welcome is not proven with our shared secret")
        return Peer(self._challenge.engine_id, self._challenge.rank, decode_schema(welcome.schema))


class AcceptorHandshake:
    """The accepting side: on_hello → on_proof."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._hello: Hello | None = None
        self._hello_raw = b""
        self._challenge_raw = b""

    def on_hello(self, hello: Hello, raw: bytes) -> bytes:
        """Returns the Challenge message to send."""
        if self._hello is not None:
            raise ProtocolError("a second hello in one handshake")
        if PROTOCOL_VERSION not in hello.versions:
            raise HandshakeRefused(
                Code.VERSION,
                f"protocol version: {PROTOCOL_VERSION} here, {list(hello.versions)} at the peer",
            )
        if hello.want and hello.want != self._identity.engine_id:
            raise HandshakeRefused(
                Code.OTHER_ENGINE,
                f"engine_id: {self._identity.engine_id} lives at this address now, not {excerpt(hello.want)}",
            )
        self._hello, self._hello_raw = hello, raw
        unsigned = Challenge(
            version=PROTOCOL_VERSION,
            engine_id=self._identity.engine_id,
            rank=self._identity.rank,
            nonce=secrets.token_bytes(NONCE_BYTES),
            proof=b"",
        )
        proof = _mac(self._identity.secret, b"acceptor", raw, encode(unsigned))
        self._challenge_raw = encode(msgspec.structs.replace(unsigned, proof=proof))
        return self._challenge_raw

    def on_proof(self, message: Proof, raw: bytes) -> tuple[Peer, bytes]:
        """Returns the peer and the Welcome message to send."""
        if self._hello is None:
            raise ProtocolError("a proof before the hello")
        secret = self._identity.secret
        expected = _mac(secret, b"connector", self._hello_raw, self._challenge_raw, message.schema)
        if not hmac.compare_digest(expected, message.proof):
            raise HandshakeRefused(
                Code.BAD_SECRET, "the peer does not know our shared secret (secret differs)"
            )
        schema = _encode_schema(self._identity.schema)
        mac = _mac(secret, b"welcome", self._hello_raw, self._challenge_raw, raw, schema)
        peer = Peer(self._hello.engine_id, self._hello.rank, decode_schema(message.schema))
        return peer, encode(Welcome(mac, schema))


def _without_proof(challenge: Challenge) -> Challenge:
    return msgspec.structs.replace(challenge, proof=b"")
