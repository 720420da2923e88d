# SPDX-License-Identifier: Apache-2.0
"""Real messages, as trees of builtin values, and a small cache that they are about."""

from __future__ import annotations

import functools
from typing import Any

import msgspec
import numpy as np

from sage_kv_connector.backends.pcie import messages as pcie
from sage_kv_connector.contract.bootstrap_room import MetadataKind
from sage_kv_connector.contract.cache_view import CanonicalPlane, KVCacheView, group_view
from sage_kv_connector.contract.element_order import strided
from sage_kv_connector.contract.prompt import PromptDigest
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.format.wire_format import WireFormat
from sage_kv_connector.integrations.common.bootstrap_answers import query_answer
from sage_kv_connector.integrations.common.prefill_ranks import PrefillEngine, PrefillRank
from sage_kv_connector.store import messages as store

LAYERS, PAGES, HEADS, PAGE_SIZE, DIM = 3, 16, 2, 8, 4
_ITEM = 2
_TOKEN = 2 * DIM * _ITEM
PAGE_BYTES = HEADS * PAGE_SIZE * _TOKEN
_PROMPT = PromptDigest(100, bytes(16))


@functools.cache
def view() -> KVCacheView:
    cache = [np.zeros((PAGES, PAGE_BYTES), np.uint8) for _ in range(LAYERS)]
    layers = [(f"layer{i}", [("kv", t, ("page", "content"))]) for i, t in enumerate(cache)]
    orders = (strided(at, PAGE_SIZE * _TOKEN, _TOKEN, _ITEM) for at in (0, DIM * _ITEM))
    canonical = tuple(CanonicalPlane(name, DIM, 0, order) for name, order in zip("kv", orders, strict=True))
    return KVCacheView(
        (group_view("fullattention", PAGE_SIZE, PAGES, layers, heads=HEADS, canonical=canonical),)
    )


@functools.cache
def schema() -> KVCacheSchema:
    made = KVCacheSchema("test", "m", "bf16", LAYERS, HEADS, 0, HEADS, DIM, (view().groups[0].schema(),))
    return msgspec.json.decode(msgspec.json.encode(made), type=KVCacheSchema)


def other_schemas() -> list[Any]:
    """Peers that convert: fp8 with scales, other pages, one of two ranks."""
    group = msgspec.structs.replace(
        schema().groups[0], page_size=16, scales=((0.5, 2.0),) * LAYERS, layers=("layer1", "layer2", "layer9")
    )
    fp8 = msgspec.structs.replace(schema(), dtype="fp8_e4m3", groups=(group,))
    rank = msgspec.structs.replace(schema(), total_kv_heads=4, head_start=1, tp_rank=1, tp_size=2)
    return [msgspec.to_builtins(other) for other in (fp8, rank)]


@functools.cache
def messages() -> list[Any]:
    nonce, packed_schema = bytes(m.NONCE_BYTES), msgspec.msgpack.encode(schema())
    formats = (WireFormat("int4", "channel", 64, zero_point=True), WireFormat("bf16"))
    pages = m.PageRuns(0, ((0, 2), (5, 1)))
    box = m.PartGroup(0, ((0, LAYERS),), 0, 64, formats)
    sent: list[m.Message] = [
        m.Hello((m.PROTOCOL_VERSION,), "decode", 0, nonce, "prefill"),
        m.Challenge(m.PROTOCOL_VERSION, "prefill", 0, nonce, bytes(32), "tcp://192.0.2.1:7000", (bytes(32),)),
        m.Proof(bytes(32), packed_schema),
        m.Welcome(bytes(32), b""),
        m.Reject("bad_secret", "differs"),
        m.Subscribe("t", 7, bytes(24), LAYERS * 3 * PAGE_BYTES, (pages,), True, False, 1000, 2, _PROMPT),
        m.SubscribeParts("t", 7, 1 << 12, (box,), 0, HEADS, 1 << 16, True, True, 1000, 1, _PROMPT),
        m.SubscribeParts("t", 7, 1 << 12, (box,), 0, HEADS, 1 << 16, True, True, 1000, 1, _PROMPT, 0, b"D"),
        m.PartsReady(7),
        m.Grant(7, 3, bytes(24)),
        m.Failed("t", 7, "expired", "nobody came"),
        m.Cancel("t", 7),
        m.Release("t", 2, "", _PROMPT),
        m.Renew(("t", "u")),
        m.Ask(1, "store.get", b"body"),
        m.Answer(1, "", "", b"body"),
    ]  # fmt: skip
    return [trees(m.encode(message)) for message in sent]


def subscriptions() -> list[Any]:
    return [tree for tree in messages() if tree[0] in ("subscribe", "subscribe_parts")]


@functools.cache
def store_bodies() -> list[Any]:
    bodies = (
        store.Put("t", ("a", "b"), (64, 4096), 1000),
        store.Get(("a",), (64,)),
        store.Offered("t", (True, False)),
        store.Held(("a", "b")),
        store.Flags((True,)),
        store.Clear("a"),
        store.Cleared(3),
        store.Where("store", "node", ("shm://a", "tcp://10.0.0.1:7000")),
        store.Stats(*range(13)),
        store.Empty(),
    )
    return [trees(store.encode(body)) for body in bodies]


@functools.cache
def pcie_messages() -> list[Any]:
    table = np.array([[0, 0, 0, 64], [1, 32, 64, 32]], dtype="<u8").tobytes()
    sent = (
        pcie.Greeting("emulator", 1, b"probe"),
        pcie.Upper(b"payload"),
        pcie.Offered(1, 0, 2, 3, (b"one", b"two"), (64, 64), table),
        pcie.Taken(1, 0, 0, ""),
        pcie.Revoked(1),
    )
    return [trees(pcie.encode(message)) for message in sent]


@functools.cache
def bootstrap_answers() -> list[Any]:
    ranks = tuple(
        PrefillRank("prefill", rank, (f"tcp://10.0.0.1:{7000 + rank}", "shm://a"), "node")
        for rank in range(2)
    )
    answers = query_answer(
        {0: PrefillEngine(ranks), 1: PrefillEngine(ranks[:1], 1, MetadataKind.FIRST_TOKEN)}
    )
    return [msgspec.json.decode(msgspec.json.encode(answers))]


def trees(message: bytes) -> Any:
    return msgspec.msgpack.decode(message)
