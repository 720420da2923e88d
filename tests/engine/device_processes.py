# SPDX-License-Identifier: Apache-2.0
"""Two processes of one node with caches on emulated devices, any shape on each side: prefill's is a child."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.engine.core import EngineCore
from tests.engine.converting_side import ConvertingSide, Shape
from tests.engine.device_side import DeviceSide
from tests.engine.test_conversion import TOKENS, Content, pages_for, write_content
from tests.other_process import OtherProcess, other_process
from tests.vendors.rig import Rig

PAGES = 24
MEMORY = 160 << 20
#: What the prefill process knows: see ``serve``.
CHILD = "import sys; from tests.engine.device_processes import serve; serve(*sys.argv[1:])"


def make_core(options: dict[str, Any], **kwargs: Any) -> EngineCore:
    core = EngineCore(KVTransportConfig.load({"backend": "pcie", **options}), **kwargs)
    core.start()
    return core


def side(vendor: str, shape: Shape, options: dict[str, Any], **settings: Any) -> DeviceSide:
    rig = Rig(vendor, memory_bytes=MEMORY, **settings)
    made = DeviceSide(make_core, shape, PAGES, rig, **options)
    rig.control.set(virtual_memory=False)  # of the KV cache alone: what we allocate has handles
    return made


def held_by(shape: Shape) -> tuple[ConvertingSide, Content]:
    """What a prefill process of this shape holds."""
    same = ConvertingSide(lambda options, **how: _NoCore(), shape, PAGES)  # type: ignore[arg-type]
    return same, write_content(same, pages_for(same, 1), range(TOKENS))


class _NoCore:
    def register_memory(self, extents: Any) -> None:
        pass


def serve(vendor: str, shape: str, options: str, settings: str) -> None:
    """The prefill process. It answers, a line each: ``offer`` (all is final), ``begin`` (nothing is), ``layer N`` (all
    pages of a layer are final), ``finish``, ``withdraw``, ``outcome``, ``released`` (how many offers), ``counts``."""
    held = side(vendor, Shape(*json.loads(shape)), json.loads(options), **json.loads(settings))
    pages = pages_for(held, 1)
    write_content(held, pages, range(TOKENS))
    held.upload()
    before = held.rig.control.counts(), held.rig.control.launches()
    print(json.dumps([held.core.engine_id, held.core.addresses]), flush=True)
    source: Any = None
    for line in sys.stdin:
        word, *rest = line.split()
        said: Any = word
        if word in ("offer", "begin"):
            source = held.offer("t", pages)
        if word == "offer":
            held.ready("t", source, slice(None), len(pages))
        if word == "layer":
            held.ready("t", source, slice(int(rest[0]), int(rest[0]) + 1), len(pages))
        if word in ("offer", "finish"):
            held.core.finish("t")
        if word == "withdraw":
            held.core.withdraw(("t",), "as the test wants it")
        if word == "outcome":
            said = held.released.get(timeout=20).ok
        if word == "released":
            said = held.released.qsize()
        if word == "counts":
            now = held.rig.control.counts()
            said = {way: now[way].bytes - before[0][way].bytes for way in now}
            said["launches"] = held.rig.control.launches() - before[1]
            said["sent"] = held.core.counters()["bytes_sent"]
        print(json.dumps(said), flush=True)
    held.core.close()


class Prefill(NamedTuple):
    other: OtherProcess
    peer: PeerAddress

    def say(self, words: str) -> Any:
        return self.other.say(words)


@contextmanager
def prefill_process(
    vendor: str, shape: Shape, options: dict[str, Any] | None = None, **settings: Any
) -> Iterator[Prefill]:
    arguments = [json.dumps(each) for each in (shape, options or {}, settings)]
    with other_process(CHILD, vendor, *arguments) as other:
        engine, addresses = other.hear()
        yield Prefill(other, PeerAddress(engine, 0, tuple(addresses)))


@contextmanager
def decode_side(vendor: str, shape: Shape, **options: Any) -> Iterator[DeviceSide]:
    here = side(vendor, shape, options)
    try:
        yield here
    finally:
        here.core.close()
