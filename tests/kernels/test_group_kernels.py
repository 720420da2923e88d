# SPDX-License-Identifier: Apache-2.0
"""Launches over a group's pages, run by the host shim, against the CPU's converter: the same wire, the same pages."""

from __future__ import annotations

import ctypes
from tempfile import NamedTemporaryFile
from threading import Barrier, Thread
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_kv_connector.contract.element_order import ElementOrder, strided
from sage_kv_connector.format.converter import ConvertedPlane, GroupConverter, Span
from sage_kv_connector.format.wire_format import WireFormat
from sage_kv_connector.kernels.common.compiler import HOST
from sage_kv_connector.kernels.plane import KernelLaunch, PagedGroup
from sage_kv_connector.kernels.registry import GroupKernels, KernelsUnavailable, kernel_sources
from tests.kernels.tiles import passed
from tests.vendors.kernels import VENDORS_OF_KERNELS

HEADS, PAGES = 3, 600
FORMATS = (
    WireFormat("bf16"),
    WireFormat("fp8_e4m3", "token"),
    WireFormat("fp8_e4m3", "channel", 32),
    WireFormat("fp8_e4m3", "tensor"),
    WireFormat("int4", "channel", zero_point=True),
    WireFormat("int4", "token", zero_point=True),
    WireFormat("int4", "head", 16),
)


class OnHost:
    """Loads what is compiled for the host, and runs launches at once."""

    def __init__(self, vendor: str) -> None:
        self.sources = kernel_sources(vendor)
        self._functions: list[tuple[ctypes.CDLL, str]] = []
        self._libraries: dict[str, ctypes.CDLL] = {}

    def function(self, verb: str, memory: str, wire: str) -> int:
        if wire not in self._libraries:
            with NamedTemporaryFile(suffix=".so") as file:
                file.write(self.sources.compiled(memory, wire, HOST))
                file.flush()
                self._libraries[wire] = ctypes.CDLL(file.name)
        self._functions.append((self._libraries[wire], f"kv_{verb}_{memory}_{wire}"))
        return len(self._functions) - 1

    def group(self, group: PagedGroup) -> GroupKernels:
        return self.sources.group(group, self.function)

    def run(self, launches: list[KernelLaunch]) -> None:
        for launch in launches:
            blocks = (ctypes.c_uint * 2)(*launch.blocks)
            library, name = self._functions[launch.function]
            given = passed(library, name, launch.argument)
            library[name](given, blocks, launch.threads, launch.shared_bytes)


@pytest.fixture(scope="module", params=VENDORS_OF_KERNELS)
def device(request: pytest.FixtureRequest) -> OnHost:
    return OnHost(request.param)


def group_of(
    cache: np.ndarray, layers: int, page: int, dim: int, formats: tuple[WireFormat, ...]
) -> list[ConvertedPlane]:
    """K and V side by side, heads outside of tokens; a layer after the other."""
    row = 2 * dim * 2
    page_bytes = HEADS * page * row
    bases = [cache.ctypes.data + layer * PAGES * page_bytes for layer in range(layers)]
    return [
        ConvertedPlane(
            strided(number * dim * 2, page * row, row, 2), page_bytes, dim, fmt, bases,
            [1.0] * layers, [0.25 + layer for layer in range(layers)],
        )
        for number, fmt in enumerate(formats)
    ]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    formats=st.tuples(st.sampled_from(FORMATS), st.sampled_from(FORMATS)),
    page=st.sampled_from((1, 4, 16)),
    dim=st.sampled_from((16, 24)),
    layers=st.integers(1, 3),
)
def test_a_box_is_what_the_cpu_makes_of_it(
    device: OnHost, seed: int, formats: tuple[WireFormat, WireFormat], page: int, dim: int, layers: int
) -> None:
    rng = np.random.default_rng(seed)
    cache = rng.normal(size=layers * PAGES * HEADS * page * 2 * dim).astype(np.float32).view(np.uint32)
    pages = (cache >> 16).astype(np.uint16)
    planes = group_of(pages, layers, page, dim, formats)
    kernels = device.group(PagedGroup("bf16", page, PAGES, HEADS, planes))
    converter = GroupConverter("bf16", page, PAGES, HEADS, planes)
    first_layer, first_head = int(rng.integers(0, layers)), int(rng.integers(0, HEADS))
    first = int(rng.integers(0, 200))
    tokens = int(rng.integers(1, min(900, (PAGES - 1) * page - 200)))
    count = (first + tokens - 1) // page - first // page + 1
    box = (first_layer, layers - first_layer, first_head, HEADS - first_head, first, tokens)
    span = Span(*box, rng.permutation(PAGES)[:count].tolist())
    nbytes = converter.wire_bytes(span)
    ours, theirs = aligned(nbytes), aligned(nbytes)
    converter.encode(span, theirs.ctypes.data, nbytes)
    device.run(kernels.launches("encode", span, ours.ctypes.data, nbytes))
    np.testing.assert_array_equal(ours, theirs)
    expected, landed = np.zeros_like(pages), np.zeros_like(pages)
    GroupConverter("bf16", page, PAGES, HEADS, group_of(expected, layers, page, dim, formats)).decode(
        span, theirs.ctypes.data, nbytes
    )
    pages_there = PagedGroup("bf16", page, PAGES, HEADS, group_of(landed, layers, page, dim, formats))
    back = device.group(pages_there)
    device.run(back.launches("decode", span, theirs.ctypes.data, nbytes))
    np.testing.assert_array_equal(landed, expected)


@pytest.mark.parametrize(
    "formats",
    [
        (
            WireFormat("int4", "channel", 160, zero_point=True),
            WireFormat("int4", "token", 320, zero_point=True),
        ),
        (WireFormat("fp8_e4m3", "channel", 160), WireFormat("fp8_e4m3", "token", 320)),
        (WireFormat("int4", "head", 160), WireFormat("bf16")),
    ],
)
def test_more_channels_and_scales_than_a_core_takes_at_a_time(
    device: OnHost, formats: tuple[WireFormat, WireFormat]
) -> None:
    page, dim, layers = 16, 300, 2
    values = np.random.default_rng(5).normal(size=layers * PAGES * HEADS * page * 2 * dim)
    pages = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    planes = group_of(pages, layers, page, dim, formats)
    converter = GroupConverter("bf16", page, PAGES, HEADS, planes)
    span = Span(0, layers, 0, HEADS, 21, 500, list(range(40, 72)))
    nbytes = converter.wire_bytes(span)
    ours, theirs = aligned(nbytes), aligned(nbytes)
    converter.encode(span, theirs.ctypes.data, nbytes)
    kernels = device.group(PagedGroup("bf16", page, PAGES, HEADS, planes))
    device.run(kernels.launches("encode", span, ours.ctypes.data, nbytes))
    np.testing.assert_array_equal(ours, theirs)
    expected, landed = np.zeros_like(pages), np.zeros_like(pages)
    GroupConverter("bf16", page, PAGES, HEADS, group_of(expected, layers, page, dim, formats)).decode(
        span, theirs.ctypes.data, nbytes
    )
    back = device.group(PagedGroup("bf16", page, PAGES, HEADS, group_of(landed, layers, page, dim, formats)))
    device.run(back.launches("decode", span, theirs.ctypes.data, nbytes))
    np.testing.assert_array_equal(landed, expected)


def aligned(nbytes: int) -> np.ndarray:
    data = np.full(nbytes + 16, 0xA5, np.uint8)
    start = -data.ctypes.data % 16
    return data[start : start + nbytes]


def no_function(*_: str) -> int:
    return 0


def launches_of(
    device: OnHost, formats: tuple[WireFormat, ...], page: int, layers: int, tokens: int
) -> list[KernelLaunch]:
    planes = group_of(np.zeros(1, np.uint16), layers, page, 16, formats)
    count = -(-tokens // page)
    kernels = device.sources.group(PagedGroup("bf16", page, count, HEADS, planes), no_function)
    nbytes = layers * HEADS * sum(fmt.span_bytes(0, tokens, 16) for fmt in formats)
    return kernels.launches(
        "encode", Span(0, layers, 0, HEADS, 0, tokens, list(range(count))), 1 << 20, nbytes
    )


def test_a_part_is_one_launch(device: OnHost) -> None:
    keys, values = (
        WireFormat("int4", "channel", zero_point=True),
        WireFormat("int4", "token", zero_point=True),
    )
    assert len(launches_of(device, (keys, values), 16, 80, 1024)) == 1
    assert len(launches_of(device, (keys, values), 16, 4, 2048)) == 1
    # Planes of two dtypes, more page ids than an argument has room for, more layers than that.
    assert len(launches_of(device, (keys, WireFormat("bf16")), 16, 4, 2048)) == 2
    assert len(launches_of(device, (keys, values), 1, 1, 2048)) == 4
    assert len(launches_of(device, (keys, values), 16, 160, 2048)) == 2


def test_what_kernels_do_not_have_is_named(device: OnHost) -> None:
    def refused(order: ElementOrder, fmt: WireFormat, named: str, count: int = 1, page: int = 16) -> None:
        planes = [ConvertedPlane(order, 4096, 16, fmt, [0], [1.0], [1.0])] * count
        with pytest.raises(ValueError, match=named):
            device.sources.group(PagedGroup("bf16", page, 8, 2, planes), no_function)

    plain, packed = strided(0, 512, 32, 2), ElementOrder(0, 512, (16, 2, 512), (2, 32, 64))
    bf16 = WireFormat("bf16")
    refused(packed, bf16, r"tokens \(16, 2, 512\).* plain strides")
    refused(plain, bf16, "5 planes, a kernel takes 4", count=5)
    refused(plain, WireFormat("int4", "head", 1024), "tiles of 1024 tokens have more pages of 1 ", page=1)
    refused(plain, WireFormat("int4", "token", rotate=True), "rotate is for measurements")
    with pytest.raises(KernelsUnavailable, match="no kernels to launch on devices of acme"):
        kernel_sources("acme")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"first_layer": 1}, "layers are 1 [+] 1, the pages have 1"),
        ({"heads": 3}, "heads are 0 [+] 3, the pages have 2"),
        ({"first_head": -1}, "heads are -1"),
        ({"tokens": 0}, "tokens are 0 [+] 0"),
        ({"pages": [1]}, "pages count is 1, 32 tokens from 0 on have 2"),
        ({"pages": [1, 8]}, "page id of 1 to 8 is not one of 8 pages"),
        ({"pages": [-1, 2]}, "page id of -1 to 2"),
        ({"heads": 1}, "wire has 2048 bytes, the box takes 1024"),
    ],
)
def test_a_box_that_is_not_there_is_not_launched(device: OnHost, changes: dict[str, Any], named: str) -> None:
    plane = ConvertedPlane(strided(0, 512, 32, 2), 1024, 16, WireFormat("bf16"), [0], [1.0], [1.0])
    kernels = device.sources.group(PagedGroup("bf16", 16, 8, 2, [plane]), no_function)
    span = Span(0, 1, 0, 2, 0, 32, [1, 2])
    assert len(kernels.launches("encode", span, 0, 2048)) == 1
    with pytest.raises(ValueError, match=named):
        kernels.launches("encode", span._replace(**changes), 0, 2048)


@pytest.mark.parametrize(
    ("vendor", "stride", "dim", "fmt", "named"),
    [
        ("nvidia", 2, 16384, WireFormat("int4", "channel"), "scales of a tile take 65536 bytes .* 49152"),
        ("cambricon", 4, 16, WireFormat("bf16"), "channels 2 elements apart: no kernel here has it"),
        ("cambricon", 2, 4098, WireFormat("bf16"), r"heads of 4098 channels \(at most 4096\): no kernel"),
        ("cambricon", 2, 15, WireFormat("int4", "head"), r"int4 of an odd number of channels \(15\): no"),
        ("kunlunxin", 4, 16, WireFormat("bf16"), "channels 2 elements apart: no kernel here has it"),
        ("kunlunxin", 2, 15, WireFormat("int4", "head"), r"int4 of an odd number of channels \(15\): no"),
    ],
)
def test_what_one_vendors_kernels_do_not_have_is_named(
    vendor: str, stride: int, dim: int, fmt: WireFormat, named: str
) -> None:
    plane = ConvertedPlane(strided(0, 1 << 20, dim * stride, stride), 1 << 24, dim, fmt, [0], [1.0], [1.0])
    with pytest.raises(ValueError, match=named):
        kernel_sources(vendor).group(PagedGroup("bf16", 64, 8, 2, [plane]), no_function)


def test_launches_run_beside_one_another(device: OnHost) -> None:
    """As those of several streams do on an emulated device."""
    page, dim, layers, tokens = 16, 16, 2, 512
    formats = (WireFormat("int4", "channel", zero_point=True), WireFormat("int4", "token", zero_point=True))
    nbytes = layers * HEADS * sum(fmt.span_bytes(0, tokens, dim) for fmt in formats)
    span = Span(0, layers, 0, HEADS, 0, tokens, list(range(tokens // page)))
    started, wrong = Barrier(4), []

    def encode(number: int) -> None:
        values = np.random.default_rng(number).normal(size=layers * PAGES * HEADS * page * 2 * dim)
        pages = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        planes = group_of(pages, layers, page, dim, formats)
        theirs, ours = aligned(nbytes), aligned(nbytes)
        GroupConverter("bf16", page, PAGES, HEADS, planes).encode(span, theirs.ctypes.data, nbytes)
        kernels = device.group(PagedGroup("bf16", page, PAGES, HEADS, planes))
        started.wait(30)
        for turn in range(20):
            ours[:] = 0xA5
            device.run(kernels.launches("encode", span, ours.ctypes.data, nbytes))
            if not np.array_equal(ours, theirs):
                wrong.append((number, turn))

    threads = [Thread(target=encode, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
