# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import msgspec
import pytest

from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.session.handshake import (
    AcceptorHandshake,
    ConnectorHandshake,
    HandshakeRefused,
    Identity,
    Peer,
    decode_schema,
)

SCHEMA = KVCacheSchema("e", "m", "bf16", 2, 2, 0, 2, 32, ())


def identity(name: str, secret: bytes = b"s") -> Identity:
    return Identity(name, 3, secret, SCHEMA)


def run(connector: ConnectorHandshake, acceptor: AcceptorHandshake) -> tuple[Peer, Peer]:
    hello = m.decode(connector.hello)
    assert isinstance(hello, m.Hello)
    raw_challenge = acceptor.on_hello(hello, connector.hello)
    challenge = m.decode(raw_challenge)
    assert isinstance(challenge, m.Challenge)
    raw_proof = connector.on_challenge(challenge, raw_challenge)
    proof = m.decode(raw_proof)
    assert isinstance(proof, m.Proof)
    seen, raw_welcome = acceptor.on_proof(proof, raw_proof)
    welcome = m.decode(raw_welcome)
    assert isinstance(welcome, m.Welcome)
    return connector.on_welcome(welcome), seen


def test_both_sides_learn_who_the_other_is() -> None:
    acceptor, connector = run(ConnectorHandshake(identity("d"), "p"), AcceptorHandshake(identity("p")))
    assert acceptor == Peer("p", 3, SCHEMA)
    assert connector == Peer("d", 3, SCHEMA)


def test_acceptor_with_another_secret_is_found_out_first() -> None:
    with pytest.raises(HandshakeRefused, match="shared secret"):
        run(ConnectorHandshake(identity("d"), ""), AcceptorHandshake(identity("p", b"other")))


def test_connector_without_the_secret_is_refused() -> None:
    connector, acceptor = ConnectorHandshake(identity("d", b"s"), ""), AcceptorHandshake(identity("p"))
    hello = m.decode(connector.hello)
    assert isinstance(hello, m.Hello)
    acceptor.on_hello(hello, connector.hello)
    forged = m.Proof(b"0" * 32, b"")
    with pytest.raises(HandshakeRefused) as refused:
        acceptor.on_proof(forged, m.encode(forged))
    assert refused.value.code == "bad_secret"


def test_a_changed_schema_breaks_the_proof() -> None:
    connector, acceptor = ConnectorHandshake(identity("d"), ""), AcceptorHandshake(identity("p"))
    hello = m.decode(connector.hello)
    assert isinstance(hello, m.Hello)
    raw_challenge = acceptor.on_hello(hello, connector.hello)
    challenge = m.decode(raw_challenge)
    assert isinstance(challenge, m.Challenge)
    proof = m.decode(connector.on_challenge(challenge, raw_challenge))
    assert isinstance(proof, m.Proof)
    other = msgspec.msgpack.encode(msgspec.structs.replace(SCHEMA, dtype="fp8_e4m3"))
    forged = m.Proof(proof.proof, other)
    with pytest.raises(HandshakeRefused):
        acceptor.on_proof(forged, m.encode(forged))


def test_a_restarted_engine_and_another_version_are_named() -> None:
    acceptor = AcceptorHandshake(identity("new"))
    stale = ConnectorHandshake(identity("d"), "old")
    hello = m.decode(stale.hello)
    assert isinstance(hello, m.Hello)
    with pytest.raises(HandshakeRefused, match="new lives at this address now, not old"):
        acceptor.on_hello(hello, stale.hello)
    future = msgspec.structs.replace(hello, versions=(9,), want="")
    with pytest.raises(HandshakeRefused, match=f"{m.PROTOCOL_VERSION} here, \\[9\\] at the peer"):
        acceptor.on_hello(future, m.encode(future))


@pytest.mark.parametrize(
    "schema", [b"\x81\xa1x" + b"\x91" * 60_000, msgspec.msgpack.encode({"engine": "\n" * 50_000, "model": 1})]
)
def test_a_schema_that_is_none_is_named_shortly(schema: bytes) -> None:
    with pytest.raises(m.ProtocolError, match="schema is not valid") as refused:
        decode_schema(schema)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 400
