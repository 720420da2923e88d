# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from sage_kv_connector.backends.protecting_backend import LANE_KEYS_BYTES
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.session.carrier import Carrier
from sage_kv_connector.engine.session.handshake import (
    AcceptorHandshake,
    ConnectorHandshake,
    HandshakeRefused,
    Identity,
    Peer,
    _Agreement,
    decode_schema,
)

DIALLED = Carrier("authenticated", "tcp://192.0.2.1:7000")
ACCEPTED = Carrier("authenticated", "tcp://192.0.2.1:7000", "tcp://192.0.2.9:41000")
SCHEMA = KVCacheSchema("e", "m", "bf16", 2, 2, 0, 2, 32, ())


def identity(name: str, secret: bytes = b"s") -> Identity:
    return Identity(name, 3, (secret,), SCHEMA)


def connector_of(who: Identity, want: str, carrier: Carrier = DIALLED) -> ConnectorHandshake:
    return ConnectorHandshake(who, want, carrier)


def acceptor_of(who: Identity, carrier: Carrier = ACCEPTED) -> AcceptorHandshake:
    return AcceptorHandshake(who, carrier)


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
    acceptor, connector = run(connector_of(identity("d"), "p"), acceptor_of(identity("p")))
    assert acceptor == Peer("p", 3, SCHEMA)
    assert connector == Peer("d", 3, SCHEMA)


def test_acceptor_with_another_secret_is_found_out_first() -> None:
    with pytest.raises(HandshakeRefused, match="shared secret"):
        run(connector_of(identity("d"), ""), acceptor_of(identity("p", b"other")))


def test_connector_without_the_secret_is_refused() -> None:
    connector, acceptor = connector_of(identity("d", b"s"), ""), acceptor_of(identity("p"))
    hello = m.decode(connector.hello)
    assert isinstance(hello, m.Hello)
    acceptor.on_hello(hello, connector.hello)
    forged = m.Proof(b"0" * 32, b"")
    with pytest.raises(HandshakeRefused) as refused:
        acceptor.on_proof(forged, m.encode(forged))
    assert refused.value.code == "bad_secret"


def test_a_changed_schema_breaks_the_proof() -> None:
    connector, acceptor = connector_of(identity("d"), ""), acceptor_of(identity("p"))
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
    acceptor = acceptor_of(identity("new"))
    stale = connector_of(identity("d"), "old")
    hello = m.decode(stale.hello)
    assert isinstance(hello, m.Hello)
    with pytest.raises(HandshakeRefused, match="new lives at this address now, not old"):
        acceptor.on_hello(hello, stale.hello)
    future = msgspec.structs.replace(hello, versions=(99,), want="")
    with pytest.raises(HandshakeRefused, match=f"{m.PROTOCOL_VERSION} here, \\[99\\] at the peer"):
        acceptor.on_hello(future, m.encode(future))


@pytest.mark.parametrize(
    "schema", [b"\x81\xa1x" + b"\x91" * 60_000, msgspec.msgpack.encode({"engine": "\n" * 50_000, "model": 1})]
)
def test_a_schema_that_is_none_is_named_shortly(schema: bytes) -> None:
    with pytest.raises(m.ProtocolError, match="schema is not valid") as refused:
        decode_schema(schema)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 400


# -- keys


def test_both_sides_come_to_the_same_keys_and_each_session_to_others() -> None:
    seen = set()
    for _ in range(2):
        connector, acceptor = connector_of(identity("d"), ""), acceptor_of(identity("p"))
        run(connector, acceptor)
        assert connector.keys is not None and acceptor.keys is not None
        assert connector.keys.send == acceptor.keys.receive != connector.keys.receive == acceptor.keys.send
        assert not connector.keys.encrypts and "encrypts=False" in repr(connector.keys)
        assert len(connector.keys.send) == LANE_KEYS_BYTES
        seen |= {connector.keys.send, connector.keys.receive}
    assert len(seen) == 4


def test_each_lane_has_a_key_and_a_first_nonce_of_its_own() -> None:
    connector = connector_of(identity("d"), "")
    run(connector, acceptor_of(identity("p")))
    assert connector.keys is not None
    lanes = [
        both[i : i + 28] for both in (connector.keys.send, connector.keys.receive) for i in range(0, 448, 28)
    ]
    assert len({lane[:16] for lane in lanes}) == len({lane[16:] for lane in lanes}) == 32


def test_without_security_there_are_no_keys() -> None:
    connector, acceptor = connector_of(identity("d"), "", Carrier()), acceptor_of(identity("p"), Carrier())
    run(connector, acceptor)
    assert connector.keys is None and acceptor.keys is None


@pytest.mark.parametrize("share", [bytes(32), (1).to_bytes(32, "little")])
def test_a_share_that_makes_the_key_known_beforehand_is_refused(share: bytes) -> None:
    hello = m.decode(connector_of(identity("d"), "").hello)
    assert isinstance(hello, m.Hello)
    forged = msgspec.structs.replace(hello, share=share)
    with pytest.raises(m.ProtocolError, match="share"):
        acceptor_of(identity("p")).on_hello(forged, m.encode(forged))


# -- two secrets while one is being changed


OLD, NEW = b"old", b"new"


@pytest.mark.parametrize("connector_knows", [(OLD,), (NEW, OLD), (NEW,)])
@pytest.mark.parametrize("acceptor_knows", [(OLD,), (NEW, OLD), (NEW,)])
def test_sides_that_have_one_secret_in_common_agree(
    connector_knows: tuple[bytes, ...], acceptor_knows: tuple[bytes, ...]
) -> None:
    connector = connector_of(Identity("d", 0, connector_knows, None), "")
    acceptor = acceptor_of(Identity("p", 0, acceptor_knows, None))
    if set(connector_knows) & set(acceptor_knows):
        run(connector, acceptor)
        assert connector.keys is not None and acceptor.keys is not None
        assert connector.keys.send == acceptor.keys.receive
    else:
        with pytest.raises(HandshakeRefused) as refused:
            run(connector, acceptor)
        assert refused.value.code == "bad_secret"


def test_no_secret_is_not_one_of_two() -> None:
    with pytest.raises(HandshakeRefused):
        run(
            connector_of(Identity("d", 0, (b"",), None), ""),
            acceptor_of(Identity("p", 0, (NEW, OLD), None)),
        )
    assert "new" not in repr(Identity("p", 0, (NEW, OLD), None))


# -- who is in between


@pytest.mark.parametrize("security", ["none", "encrypted"])
def test_another_security_is_refused_by_both_values(security: str) -> None:
    connector = connector_of(identity("d"), "", DIALLED._replace(security=security))
    with pytest.raises(
        HandshakeRefused, match=f"security: authenticated here, {security} at the peer"
    ) as refused:
        run(connector, acceptor_of(identity("p")))
    assert refused.value.code == "security"


@pytest.mark.parametrize(
    ("dialled", "known"),
    [
        ("tcp://192.0.2.1:7000", True),
        ("tcp://[::ffff:192.0.2.1]:7000", True),
        ("tcp://10.1.1.1:7000", True),
        ("tcp://192.0.2.1:7001", False),
        ("tcp://192.0.2.66:7000", False),
        ("tcp://prefill.example:7000", False),
        ("", False),
    ],
)
def test_a_relay_is_found_out_by_what_was_dialled(dialled: str, known: bool) -> None:
    """The engine advertises one address, and the socket says another one."""
    at = ACCEPTED._replace(address="tcp://192.0.2.1:7000, tcp://10.1.1.1:7000")
    connector = connector_of(identity("d"), "", DIALLED._replace(address=dialled))
    if known:
        run(connector, acceptor_of(identity("p"), at))
        return
    with pytest.raises(HandshakeRefused, match="a relay stands between") as refused:
        run(connector, acceptor_of(identity("p"), at))
    assert refused.value.code == "relayed"


def test_of_an_advertised_name_the_port_counts() -> None:
    at = ACCEPTED._replace(address="tcp://prefill.example:7000, tcp://10.1.1.1:9")
    run(connector_of(identity("d"), ""), acceptor_of(identity("p"), at))
    with pytest.raises(HandshakeRefused, match="a relay"):
        other = DIALLED._replace(address="tcp://192.0.2.1:7001")
        run(connector_of(identity("d"), "", other), acceptor_of(identity("p"), at))


def test_a_relay_can_not_say_what_was_dialled() -> None:
    """Nor who it is, nor weaken the protection: the proofs are over the hello as it was sent."""
    for change in (
        {"address": "tcp://192.0.2.1:7000"},
        {"security": "authenticated"},
        {"want": "p"},
        {"rank": 9},
        {"share": X25519PrivateKey.generate().public_key().public_bytes_raw()},
    ):
        connector = connector_of(
            identity("d"), "", Carrier("none", "tcp://192.0.2.66:7000")
        )  # that is what the relay was dialled by, and told
        hello = m.decode(connector.hello)
        assert isinstance(hello, m.Hello)
        right = {"address": "tcp://192.0.2.1:7000", "security": "authenticated"}
        forged = msgspec.structs.replace(hello, **{**right, **change})
        raw = acceptor_of(identity("p")).on_hello(forged, m.encode(forged))
        challenge = m.decode(raw)
        assert isinstance(challenge, m.Challenge)
        with pytest.raises(HandshakeRefused, match="shared secret"):
            connector.on_challenge(challenge, raw)


@pytest.mark.parametrize("changed", ["hello", "challenge", "proof", "welcome"])
def test_no_byte_of_a_handshake_can_be_changed_on_the_way(changed: str) -> None:
    """Of the same length as well: whoever gets the changed message, or the next one, finds out."""
    size = len(connector_of(identity("d"), "p").hello) if changed == "hello" else 90
    for at in range(size):
        at_connector, at_acceptor = connector_of(identity("d"), "p"), acceptor_of(identity("p"))

        def on_the_way(name: str, raw: bytes, at: int = at) -> bytes:
            if name != changed:
                return raw
            return raw[: at % len(raw)] + bytes([raw[at % len(raw)] ^ 1]) + raw[at % len(raw) + 1 :]

        with pytest.raises((HandshakeRefused, m.ProtocolError)):
            raw = on_the_way("hello", at_connector.hello)
            hello = m.decode(raw)
            if not isinstance(hello, m.Hello):
                raise m.ProtocolError("not expected")
            raw = on_the_way("challenge", at_acceptor.on_hello(hello, raw))
            challenge = m.decode(raw)
            if not isinstance(challenge, m.Challenge):
                raise m.ProtocolError("not expected")
            raw = on_the_way("proof", at_connector.on_challenge(challenge, raw))
            proof = m.decode(raw)
            if not isinstance(proof, m.Proof):
                raise m.ProtocolError("not expected")
            _, raw = at_acceptor.on_proof(proof, raw)
            welcome = m.decode(on_the_way("welcome", raw))
            if not isinstance(welcome, m.Welcome):
                raise m.ProtocolError("not expected")
            at_connector.on_welcome(welcome)


def test_messages_of_one_session_are_worth_nothing_in_another() -> None:
    """Recorded and sent again, or spliced by somebody between two sessions."""
    acceptor = acceptor_of(identity("p"))
    first, second = connector_of(identity("d"), ""), connector_of(identity("d"), "")
    hello = m.decode(first.hello)
    assert isinstance(hello, m.Hello)
    raw = acceptor.on_hello(hello, first.hello)
    challenge = m.decode(raw)
    assert isinstance(challenge, m.Challenge)
    with pytest.raises(HandshakeRefused):
        second.on_challenge(challenge, raw)
    proof_raw = first.on_challenge(challenge, raw)
    proof = m.decode(proof_raw)
    assert isinstance(proof, m.Proof)
    again = acceptor_of(identity("p"))
    again.on_hello(hello, first.hello)
    with pytest.raises(HandshakeRefused):
        again.on_proof(proof, proof_raw)
    _, welcome_raw = acceptor.on_proof(proof, proof_raw)
    welcome = m.decode(welcome_raw)
    assert isinstance(welcome, m.Welcome)
    third = connector_of(identity("d"), "")
    with pytest.raises(m.ProtocolError, match="before the challenge"):
        third.on_welcome(welcome)
    reflected = m.Proof(welcome.proof, welcome.schema)
    with pytest.raises(HandshakeRefused):
        acceptor.on_proof(reflected, m.encode(reflected))


@pytest.mark.parametrize("security", ["authenticated", "encrypted"])
def test_each_side_sends_with_its_own_half_of_what_is_derived(security: str) -> None:
    """Which half is whose is the protocol: two versions must agree."""
    connector, acceptor = _Agreement(), _Agreement()
    connector.meet(acceptor.share)
    acceptor.meet(connector.share)
    both = connector.derive(b"s", b"traffic", b"transcript", length=2 * LANE_KEYS_BYTES)
    halves = both[:LANE_KEYS_BYTES], both[LANE_KEYS_BYTES:]
    connects = connector.keys(security, True, b"s", b"transcript")
    accepts = acceptor.keys(security, False, b"s", b"transcript")
    assert connects is not None and (connects.send, connects.receive) == halves
    assert accepts is not None and (accepts.receive, accepts.send) == halves
