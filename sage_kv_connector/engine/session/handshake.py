# SPDX-License-Identifier: Apache-2.0
"""Mutual proof of the shared secret, bound to every byte of the handshake so far, and the keys that come of it.

Both sides agree on a key that only they know (X25519), and mix the shared secret into it (HKDF-SHA256, the secret is
its salt). Proofs and traffic keys are derived from that and from the exact messages exchanged before, so neither can be
used in another role, session, or with other parameters; who learns the secret later can't read what was recorded.
No I/O here: bytes in, bytes out.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import NamedTuple

import msgspec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sage_kv_connector.backends.protecting_backend import LANE_KEYS_BYTES, TrafficKeys
from sage_kv_connector.contract.failure import Code, excerpt, printable
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.engine.session.carrier import Carrier
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

PROOF_BYTES = 32

_schema_decoder = msgspec.msgpack.Decoder(KVCacheSchema)


class Identity(NamedTuple):
    """Who this side is, and what it proves. ``secrets``: those it accepts, its own first; b"" for none."""

    engine_id: str
    rank: int
    secrets: tuple[bytes, ...]
    schema: KVCacheSchema | None

    @property
    def has_secret(self) -> bool:
        return any(self.secrets)

    def __repr__(self) -> str:
        return f"Identity({self.engine_id!r}, {self.rank})"


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


class _Agreement:
    """This side's half of the key agreement, and what is derived from both."""

    def __init__(self) -> None:
        self._private = X25519PrivateKey.generate()
        self.share = self._private.public_key().public_bytes_raw()
        self._shared = b""

    def meet(self, share: bytes) -> None:
        try:
            self._shared = self._private.exchange(X25519PublicKey.from_public_bytes(share))
        except ValueError as error:
            raise ProtocolError("share is no X25519 public key that can be agreed with") from error

    def derive(self, secret: bytes, label: bytes, *parts: bytes, length: int = PROOF_BYTES) -> bytes:
        digest = hashlib.sha256()
        for part in parts:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        info = b"sage-kvt/8 " + label + b"\0" + digest.digest()
        return HKDF(SHA256(), length, salt=secret, info=info).derive(self._shared)

    def keys(self, security: str, connects: bool, secret: bytes, *parts: bytes) -> TrafficKeys | None:
        if security == "none":
            return None
        both = self.derive(secret, b"traffic", *parts, length=2 * LANE_KEYS_BYTES)
        of_connector, of_acceptor = both[:LANE_KEYS_BYTES], both[LANE_KEYS_BYTES:]
        encrypts = security == "encrypted"
        if connects:
            return TrafficKeys(encrypts, of_connector, of_acceptor)
        return TrafficKeys(encrypts, of_acceptor, of_connector)


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
    """The connecting side: ``hello`` → on_challenge → on_welcome. ``keys`` are there after on_challenge."""

    def __init__(self, identity: Identity, want: str, carrier: Carrier) -> None:
        self._identity = identity
        self._carrier = carrier
        self._agreement = _Agreement()
        self.hello = encode(
            Hello(
                versions=(PROTOCOL_VERSION,),
                engine_id=identity.engine_id,
                rank=identity.rank,
                nonce=secrets.token_bytes(NONCE_BYTES),
                want=want,
                share=self._agreement.share,
                address=carrier.address,
                security=carrier.security,
            )
        )
        self.keys: TrafficKeys | None = None
        self._challenge: Challenge | None = None
        self._secret = b""
        self._transcript: tuple[bytes, ...] = ()

    def on_challenge(self, challenge: Challenge, raw: bytes) -> bytes:
        """Check the acceptor's proofs; returns the Proof message to send, the last one before ``keys`` are used."""
        if self._challenge is not None:
            raise ProtocolError("a second challenge in one handshake")
        if challenge.version != PROTOCOL_VERSION:
            raise HandshakeRefused(
                Code.VERSION, f"protocol version: {PROTOCOL_VERSION} here, {challenge.version} at the peer"
            )
        self._agreement.meet(challenge.share)
        unsigned = encode(msgspec.structs.replace(challenge, proofs=()))
        self._secret = self._known(challenge.proofs, unsigned)
        self._challenge = challenge
        schema = _encode_schema(self._identity.schema)
        mac = self._agreement.derive(self._secret, b"connector", self.hello, raw, schema)
        proof = encode(Proof(mac, schema))
        self._transcript = (self.hello, raw, proof)
        self.keys = self._agreement.keys(self._carrier.security, True, self._secret, *self._transcript)
        return proof

    def _known(self, proofs: tuple[bytes, ...], unsigned: bytes) -> bytes:
        """The secret that one of the acceptor's proofs is made with."""
        found = None
        for secret in self._identity.secrets:
            expected = self._agreement.derive(secret, b"acceptor", self.hello, unsigned)
            for proof in proofs:
                if hmac.compare_digest(expected, proof) and found is None:
                    found = secret
        if found is None:
            raise HandshakeRefused(
                Code.BAD_SECRET, "the peer does not know our shared secret (secret differs)"
            )
        return found

    def on_welcome(self, welcome: Welcome) -> Peer:
        if self._challenge is None:
            raise ProtocolError("a welcome before the challenge")
        expected = self._agreement.derive(self._secret, b"welcome", *self._transcript, welcome.schema)
        if not hmac.compare_digest(expected, welcome.proof):
            raise HandshakeRefused(Code.BAD_SECRET, "the peer's welcome is not proven with our shared secret")
        return Peer(self._challenge.engine_id, self._challenge.rank, decode_schema(welcome.schema))


class AcceptorHandshake:
    """The accepting side: on_hello → on_proof. ``keys`` are there after on_proof, for the welcome and all behind it."""

    def __init__(self, identity: Identity, carrier: Carrier) -> None:
        self._identity = identity
        self._carrier = carrier
        self._agreement = _Agreement()
        self.keys: TrafficKeys | None = None
        self._hello: Hello | None = None
        self._hello_raw = b""
        self._challenge_raw = b""

    def on_hello(self, hello: Hello, raw: bytes) -> bytes:
        """Returns the Challenge message to send."""
        if self._hello is not None:
            raise ProtocolError("a second hello in one handshake")
        self._check(hello)
        self._agreement.meet(hello.share)
        self._hello, self._hello_raw = hello, raw
        unsigned = Challenge(
            version=PROTOCOL_VERSION,
            engine_id=self._identity.engine_id,
            rank=self._identity.rank,
            nonce=secrets.token_bytes(NONCE_BYTES),
            share=self._agreement.share,
            address=self._carrier.peer,
            proofs=(),
        )
        signed = encode(unsigned)
        proofs = tuple(self._agreement.derive(s, b"acceptor", raw, signed) for s in self._identity.secrets)
        self._challenge_raw = encode(msgspec.structs.replace(unsigned, proofs=proofs))
        return self._challenge_raw

    def _check(self, hello: Hello) -> None:
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
        if hello.security != self._carrier.security:
            raise HandshakeRefused(
                Code.SECURITY,
                f"security: {self._carrier.security} here, {printable(hello.security[:64])} at the peer",
            )
        if self._identity.has_secret and not self._carrier.is_known_as(hello.address):
            raise HandshakeRefused(
                Code.RELAYED,
                f"address: {printable(hello.address)} was dialled, this engine is at {self._carrier.address}: a relay "
                "stands between, or advertise_host and advertise_port do not say where peers reach this engine",
            )

    def on_proof(self, message: Proof, raw: bytes) -> tuple[Peer, bytes]:
        """Returns the peer and the Welcome message to send."""
        if self._hello is None:
            raise ProtocolError("a proof before the hello")
        parts = (self._hello_raw, self._challenge_raw)
        found = None
        for secret in self._identity.secrets:
            expected = self._agreement.derive(secret, b"connector", *parts, message.schema)
            if hmac.compare_digest(expected, message.proof) and found is None:
                found = secret
        if found is None:
            raise HandshakeRefused(
                Code.BAD_SECRET, "the peer does not know our shared secret (secret differs)"
            )
        peer = Peer(self._hello.engine_id, self._hello.rank, decode_schema(message.schema))
        self.keys = self._agreement.keys(self._carrier.security, False, found, *parts, raw)
        schema = _encode_schema(self._identity.schema)
        return peer, encode(Welcome(self._agreement.derive(found, b"welcome", *parts, raw, schema), schema))
