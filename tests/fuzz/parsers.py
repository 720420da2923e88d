# SPDX-License-Identifier: Apache-2.0
"""Every parser in Python that sees a peer's bytes, each as a function of one fuzz input.

A function returns when the input was refused as documented, or taken and what must hold of it did. Anything else that
it raises is a finding. An input's first byte says how its others are meant: as bytes of the wire, or as choices of
``mutation``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np

from sage_kv_connector.backends.base import Capabilities
from sage_kv_connector.backends.pcie import messages as pcie
from sage_kv_connector.backends.pcie.backend import PcieBackend
from sage_kv_connector.contract.bootstrap_room import parse_room
from sage_kv_connector.contract.dtypes import DTYPE_BITS
from sage_kv_connector.contract.failure import printable, reason_of_peer
from sage_kv_connector.contract.peer_view import PEER_PAGES, view_of_peer
from sage_kv_connector.contract.schema import KVCacheSchema, Verdict
from sage_kv_connector.engine import order_addresses
from sage_kv_connector.engine.control.names import has_name, is_loopback
from sage_kv_connector.engine.conversion.bounce import device_group
from sage_kv_connector.engine.conversion.peer_pages import PeerPages
from sage_kv_connector.engine.conversion.wire_plan import converted_planes, needs_conversion, plan_wire
from sage_kv_connector.engine.pages.paged import PagedSource
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.session.agreement import schema_verdict
from sage_kv_connector.engine.session.carrier import Carrier
from sage_kv_connector.engine.session.handshake import (
    AcceptorHandshake,
    ConnectorHandshake,
    HandshakeRefused,
    Identity,
    decode_schema,
)
from sage_kv_connector.engine.transfer.part_sender import parts_of, read_cursor
from sage_kv_connector.integrations.common.bootstrap_answers import engines_in
from sage_kv_connector.integrations.common.prefill_ranks import DecodeRank, read_peers
from sage_kv_connector.kernels.cuda.group import GroupKernels
from sage_kv_connector.kernels.registry import PagedGroup
from sage_kv_connector.store import messages as store
from tests.fuzz import samples
from tests.fuzz.mutation import Choices, mutated

_ENGINE, _SESSION = "sage_kv_connector.engine", "sage_kv_connector.engine.session"
_PCIE, _ANSWERS = (
    "sage_kv_connector.backends.pcie.messages",
    "sage_kv_connector.integrations.common.bootstrap_answers",
)
#: Backends carry no longer one.
MAX_MESSAGE = 1 << 20
#: Of an error about a peer's words, in characters; a schema has many fields.
MAX_WORDS = 8192

Parser = Callable[[bytes], None]

_HOST = Capabilities("tcp", 1, crosses_nodes=True, pages=True, parts=True)
_STORE_BODIES: tuple[type[msgspec.Struct], ...] = (
    store.Put,
    store.Get,
    store.Held,
    store.Clear,
    store.Cleared,
    store.Flags,
    store.Offered,
    store.Where,
    store.Stats,
    store.Empty,
)


def packed(seeds: Sequence[Any], data: bytes) -> bytes:
    """What a peer sends, of an input."""
    if not data or data[0] % 2 == 0:
        return data[1:]
    return msgspec.msgpack.encode(mutated(seeds, Choices(data[1:])))[:MAX_MESSAGE]


def check_words(said: object) -> None:
    """They go to a log and to the peer: one line of what was said, and not all that a peer may say."""
    assert str(said).isprintable() and len(str(said)) < MAX_WORDS


def session_messages(data: bytes) -> None:
    try:
        message = m.decode(packed(samples.messages(), data))
    except m.ProtocolError as error:
        check_words(error)
        return
    assert m.decode(m.encode(message)) == message
    if isinstance(message, m.Failed | m.Reject):
        assert "\n" not in str(reason_of_peer(message.code, message.detail))


def handshake(data: bytes) -> None:
    """Whole handshakes with a peer that knows the secret, or does not; each message may be anything."""
    choices = Choices(data)
    how = choices.below(256)
    ours = Identity("here", 0, (b"secret", b"old"), samples.schema())
    theirs = Identity("there", 1, (b"secret" if how & 1 else b"guessed",), samples.schema())
    carrier = Carrier(("none", "encrypted")[how >> 3 & 1], "tcp://192.0.2.1:7000")
    acceptor = AcceptorHandshake(ours, carrier)
    connector = ConnectorHandshake(theirs, "here" if how & 2 else "", carrier)
    if how & 4:
        acceptor, connector = AcceptorHandshake(theirs, carrier), ConnectorHandshake(ours, "", carrier)
    said = {"hello": connector.hello}
    try:
        for _ in range(5):
            step = choices.below(8)
            raw = said.get(("hello", "challenge", "proof", "welcome")[step % 4], b"")
            if step >= 4:
                tree = samples.trees(raw) if raw else "?"
                raw = msgspec.msgpack.encode(mutated([tree, *samples.messages()], choices))
            match m.decode(raw):
                case m.Hello() as message:
                    said["challenge"] = acceptor.on_hello(message, raw)
                case m.Challenge() as message:
                    said["proof"] = connector.on_challenge(message, raw)
                case m.Proof() as message:
                    peer, said["welcome"] = acceptor.on_proof(message, raw)
                    assert how & 1 and peer.schema == samples.schema()
                case m.Welcome() as message:
                    peer = connector.on_welcome(message)
                    assert how & 1 and peer.schema == samples.schema()
    except (m.ProtocolError, HandshakeRefused) as error:
        check_words(error)


def schemas(data: bytes) -> None:
    """A peer's schema, after its proof: what both sides come to, and how they would convert."""
    ours, view = samples.schema(), samples.view()
    try:
        theirs = decode_schema(packed([msgspec.to_builtins(ours), *samples.other_schemas()], data))
    except m.ProtocolError as error:
        check_words(error)
        return
    if theirs is None:
        return
    assert decode_schema(msgspec.msgpack.encode(theirs)) == theirs or _has_nan(theirs)
    check_words(schema_verdict(ours, theirs, _HOST).refusal or "")
    theirs.digest()
    theirs.bytes_per_token()
    if ours.compare(theirs).verdict is Verdict.INCOMPATIBLE:
        return
    needs_conversion(ours, theirs, "int4", device_memory=False)
    for producer, consumer in ((ours, theirs), (theirs, ours)):
        plan = plan_wire(ours, theirs, "auto")
        for index, formats in enumerate(plan.formats):
            try:
                converted_planes(view.groups[index], index, formats, ours, consumer, producer)
            except ValueError:
                pass
    _read_in_place(ours, theirs)


def _read_in_place(ours: KVCacheSchema, theirs: KVCacheSchema) -> None:
    """Kernels over the peer's pages, by what it tells of them."""
    for index, formats in enumerate(plan_wire(ours, theirs, "auto").formats):
        try:
            peers = view_of_peer(theirs.groups[index], DTYPE_BITS[theirs.dtype] // 8)
            group = device_group(
                peers, theirs.dtype, converted_planes(peers, index, formats, theirs, ours, theirs)
            )
            paged = PagedGroup(theirs.dtype, group.view.page_size, PEER_PAGES, peers.heads, group.planes)
            GroupKernels(paged, lambda *names: 1)
            PeerPages(peers, 2, 0)
        except ValueError as error:
            check_words(error)


def _has_nan(schema: KVCacheSchema) -> bool:
    return any(scale != scale for group in schema.groups for row in group.scales for scale in row)


_ON_DEVICES: Any = SimpleNamespace(backend=SimpleNamespace(capabilities=PcieBackend.capabilities))
_CONVERTERS: Any = SimpleNamespace(schema=samples.schema())


def subscriptions(data: bytes) -> None:
    """What a peer may ask of pages on offer, plain and in parts."""
    try:
        message = m.decode(packed(samples.subscriptions(), data))
    except m.ProtocolError:
        return
    source = PagedSource(samples.view(), 0)
    source.append(0, np.arange(samples.PAGES, dtype=np.int64))
    source.end_here()
    try:
        if isinstance(message, m.Subscribe):
            cursor = source.cursor(message.selection, message.nbytes)
            taken = 0
            while not cursor.exhausted and (ready := cursor.take_ready()) is not None:
                taken += int(ready[:, 2].sum())
            assert taken == message.nbytes
        elif isinstance(message, m.SubscribeParts):
            parts = parts_of(message, source.token_pages())
            assert len(parts) <= 1 << 18 and (parts >= 0).all()
            read_cursor(message, source, _ON_DEVICES, _CONVERTERS).take_ready()
    except ValueError:
        pass


def store_bodies(data: bytes) -> None:
    kind = _STORE_BODIES[data[0] // 2 % len(_STORE_BODIES)] if data else store.Put
    try:
        body = store.decode(packed(samples.store_bodies(), data), kind)
    except store.BodyError as error:
        check_words(error)
        return
    assert store.decode(store.encode(body), kind) == body


def pcie_messages(data: bytes) -> None:
    try:
        message = pcie.decode(packed(samples.pcie_messages(), data))
        assert pcie.decode(pcie.encode(message)) == message
        if isinstance(message, pcie.Offered):
            rows = pcie.rows_of(message)
            for allocation, offset, _, length in rows.tolist():
                assert 0 < length <= message.sizes[allocation] - offset
    except pcie.PcieProtocolError as error:
        check_words(error)


def bootstrap_answers(data: bytes) -> None:
    answer = data[1:]
    if data and data[0] % 2:
        answer = msgspec.json.encode(mutated(samples.bootstrap_answers(), Choices(data[1:], (b"[", b"]"))))
    try:
        engines = engines_in(answer)
    except ValueError:
        return
    for engine in engines.values():
        try:
            read_peers(DecodeRank(0, 2, 4), engine, ("shm", "tcp"))
        except ValueError:
            pass


def names(data: bytes) -> None:
    """Addresses, rooms and texts that clients and peers name."""
    text = data.decode("utf-8", "replace")
    has_name(text)
    is_loopback(text)
    assert all(address == text for address in order_addresses((text,), "", ("shm", "tcp")))
    shown = printable(text)
    assert shown.isprintable()
    number = struct.unpack("<q", data[:8].ljust(8, b"\0"))[0]
    for room in (number, text, None, data):
        try:
            parse_room(
                {"bootstrap_room": room, "bootstrap_host": text, "bootstrap_port": number}, on_decode=True
            )
        except ValueError:
            pass


PARSERS: dict[str, Parser] = {
    parser.__name__: parser
    for parser in (
        session_messages,
        handshake,
        schemas,
        subscriptions,
        store_bodies,
        pcie_messages,
        bootstrap_answers,
        names,
    )
}


#: Whose lines the report counts for a parser: modules, or functions of one.
CODE_OF: dict[str, tuple[str, ...]] = {
    "session_messages": (f"{_SESSION}.messages", f"{_SESSION}.transfer_messages", f"{_SESSION}.bounds"),
    "handshake": (f"{_SESSION}.handshake",),
    "schemas": (
        "sage_kv_connector.contract.schema",
        "sage_kv_connector.contract.peer_view",
        f"{_SESSION}.agreement:schema_verdict",
    ),
    "subscriptions": (
        f"{_ENGINE}.conversion.part_plan",
        f"{_ENGINE}.transfer.part_sender:parts_of",
        f"{_ENGINE}.transfer.part_sender:read_cursor",
    ),
    "store_bodies": ("sage_kv_connector.store.messages",),
    "pcie_messages": (f"{_PCIE}:decode", f"{_PCIE}:rows_of"),
    "bootstrap_answers": (f"{_ANSWERS}:engines_in",),
    "names": (
        *(f"{_ENGINE}.control.names:{name}" for name in ("has_name", "is_loopback", "_number", "_host_of")),
        "sage_kv_connector.contract.bootstrap_room:parse_room",
        "sage_kv_connector.contract.failure:printable",
    ),
}


def seeds_of(name: str) -> list[bytes]:
    """Inputs that are real messages, as they are encoded now, and a few that are choices."""
    trees: dict[str, Callable[[], list[Any]]] = {
        "session_messages": samples.messages,
        "subscriptions": samples.subscriptions,
        "schemas": samples.other_schemas,
        "store_bodies": samples.store_bodies,
        "pcie_messages": samples.pcie_messages,
    }
    seeds = [b"\0" + msgspec.msgpack.encode(tree) for tree in trees.get(name, list)()]
    if name == "bootstrap_answers":
        seeds += [b"\0" + msgspec.json.encode(tree) for tree in samples.bootstrap_answers()]
    if name == "names":
        seeds += [b"tcp://[::1%lo]:7000", b"shm://a", struct.pack("<q", 5) + b"host.example"]
    return [*seeds, bytes([255, *range(32)]), bytes(range(1, 64, 2))]
