# SPDX-License-Identifier: Apache-2.0
"""Pages of a device whose order is not known: they are staged whole, to an equal cache only."""

from __future__ import annotations

import ctypes
import queue
from collections.abc import Iterator
from select import POLLIN, poll
from typing import Any

import msgspec
import numpy as np
import pytest

from sage_kv_connector.contract.cache_view import GroupView, KVCacheView, group_view
from sage_kv_connector.contract.prompt import UNBOUND
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.engine.conversion.device_jobs import DeviceConversions
from sage_kv_connector.engine.conversion.device_kernels import DeviceKernels
from sage_kv_connector.engine.pages.paged import PagedSource
from sage_kv_connector.engine.pages.source import SelectionError
from sage_kv_connector.engine.session.transfer_messages import PartGroup, SubscribeParts
from sage_kv_connector.engine.transfer.part_sender import parts_of
from sage_kv_connector.format.converter import Span
from tests.engine.device_side import DeviceTensor
from tests.vendors.rig import Rig

PAGES, BYTES, TOKENS = 6, 768, 16


class Cache:
    """Two layers on a device, each page in two runs."""

    def __init__(self) -> None:
        self.rig = Rig("ascend", memory_bytes=64 << 20)
        self.content = [self.rig.random(PAGES * BYTES, seed) for seed in (1, 2)]
        layers = []
        for number, content in enumerate(self.content):
            base = self.rig.upload(content)
            half = [DeviceTensor(base + at, (PAGES, BYTES)) for at in (0, 512)]
            planes = [
                (f"state{i}", _Part(one, width), ("page", "content"))
                for i, (one, width) in enumerate(zip(half, (512, 256), strict=True))
            ]
            layers.append((f"l{number}", planes))
        self.view: GroupView = group_view("mamba", TOKENS, PAGES, layers)
        self.schema = KVCacheSchema("e", "m", "nvfp4", 2, 1, 0, 1, 1, (self.view.schema(),), memory="device")
        kernels = DeviceKernels(self.rig.runtime, 0, "nvfp4", ())
        assert kernels.lacks == "pages of nvfp4 go as they are"
        self.conversions = DeviceConversions(
            self.rig.runtime, 0, 1, 1 << 20, lambda *_: None, kernels, whole_pages=True
        )

    def group(self, peer: KVCacheSchema) -> Any:
        return self.conversions.group(self.view, 0, (), self.schema, self.schema, peer)

    def move(self, job: int, done: queue.Queue[str]) -> str:
        waiting = poll()
        waiting.register(self.conversions.fileno(), POLLIN)
        while done.empty():
            assert waiting.poll(10_000)
            for ended in self.conversions.poll():
                self.conversions._on_copied(ended)
        return done.get()


class _Part:
    """Some bytes of each page."""

    def __init__(self, whole: DeviceTensor, width: int) -> None:
        self._whole, self.shape = whole, (PAGES, width)

    def data_ptr(self) -> int:
        return self._whole.data_ptr()

    def stride(self) -> tuple[int, int]:
        return (BYTES, 1)

    def element_size(self) -> int:
        return 1


@pytest.fixture
def cache() -> Iterator[Cache]:
    made = Cache()
    yield made
    made.conversions.close()


def test_pages_come_to_the_wire_layer_by_layer_and_back(cache: Cache) -> None:
    group, done = cache.group(cache.schema), queue.Queue[str]()
    wire = cache.rig.pinned(2 * 2 * BYTES)
    span = Span(0, 2, 0, 1, TOKENS, 2 * TOKENS, [4, 1])
    job = cache.conversions.encode(group, span, wire.ctypes.data, len(wire), done.put)
    assert cache.move(job, done) == ""
    pages = [content.reshape(PAGES, BYTES)[page] for content in cache.content for page in (4, 1)]
    assert np.array_equal(wire, np.concatenate(pages))
    job = cache.conversions.decode(group, span._replace(pages=[0, 2]), wire.ctypes.data, len(wire), done.put)
    assert cache.move(job, done) == ""
    for layer, content in zip(cache.view.layers, cache.content, strict=True):
        after = cache.rig.download(layer.planes[0].base, PAGES * BYTES).reshape(PAGES, BYTES)
        before = content.reshape(PAGES, BYTES)
        assert np.array_equal(after, before[[4, 1, 1, 3, 4, 5]])


def test_another_length_than_the_pages_have_is_refused(cache: Cache) -> None:
    group = cache.group(cache.schema)
    wire = (ctypes.c_uint8 * BYTES)()
    with pytest.raises(ValueError, match=f"wire has {BYTES - 1} bytes, the pages {BYTES}"):
        cache.conversions.encode(
            group, Span(0, 1, 0, 1, 0, TOKENS, [3]), ctypes.addressof(wire), BYTES - 1, print
        )
    assert cache.conversions.counters()["conversions"] == 0


@pytest.mark.parametrize("change", [{"tp_size": 2}, {"dtype": "int8"}, {"memory": "host"}])
def test_another_cache_gets_nothing(change: dict[str, Any], cache: Cache) -> None:
    with pytest.raises(ValueError, match="pages of group 0 go as they are, to an equal cache only"):
        cache.group(msgspec.structs.replace(cache.schema, **change))


@pytest.mark.parametrize(("first", "tokens"), [(1, TOKENS), (0, TOKENS - 1)])
def test_who_asks_for_less_than_a_page_is_refused(first: int, tokens: int, cache: Cache) -> None:
    source = PagedSource(KVCacheView((cache.view,))).token_pages()
    group = PartGroup(0, ((0, 2),), first, tokens, ())
    request = SubscribeParts("t", 1, 1, (group,), 0, 1, 1 << 20, True, True, 1000, 1, UNBOUND)
    with pytest.raises(SelectionError, match=rf"tokens: {first}, \+{tokens} asked for of group 0"):
        parts_of(request, source)
    whole = msgspec.structs.replace(group, first_token=TOKENS, tokens=2 * TOKENS)
    request = msgspec.structs.replace(request, groups=(whole,))
    assert parts_of(request, source).tolist() == [[0, 0, 2, TOKENS, 2 * TOKENS, 4 * BYTES]]
