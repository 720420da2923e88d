# SPDX-License-Identifier: Apache-2.0
"""Launches over a group's pages, run by the host shim, against the CPU's converter: the same wire, the same pages."""

from __future__ import annotations

import ctypes
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_kv_connector.contract.element_order import ElementOrder, strided
from sage_kv_connector.format.converter import ConvertedPlane, GroupConverter, Span
from sage_kv_connector.format.wire_format import WireFormat
from sage_kv_connector.kernels.cuda.compiler import HOST, compiled
from sage_kv_connector.kernels.cuda.group import GroupKernels
from sage_kv_connector.kernels.plane import KernelLaunch, PagedGroup
from sage_kv_connector.kernels.registry import KernelsUnavailable, kernel_sources

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

    def __init__(self) -> None:
        self._functions: list[Any] = []
        self._libraries: dict[str, ctypes.CDLL] = {}

    def function(self, verb: str, memory: str, wire: str) -> int:
        if wire not in self._libraries:
            with NamedTemporaryFile(suffix=".so") as file:
                file.write(compiled(memory, wire, HOST))
                file.flush()
                self._libraries[wire] = ctypes.CDLL(file.name)
        self._functions.append(self._libraries[wire][f"kv_{verb}_{memory}_{wire}"])
        return len(self._functions) - 1

    def run(self, launches: list[KernelLaunch]) -> None:
        for launch in launches:
            blocks = (ctypes.c_uint * 2)(*launch.blocks)
            self._functions[launch.function](launch.argument, blocks, launch.threads, launch.shared_bytes)


HOST_DEVICE = OnHost()


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
    seed: int, formats: tuple[WireFormat, WireFormat], page: int, dim: int, layers: int
) -> None:
    rng = np.random.default_rng(seed)
    cache = rng.normal(size=layers * PAGES * HEADS * page * 2 * dim).astype(np.float32).view(np.uint32)
    pages = (cache >> 16).astype(np.uint16)
    planes = group_of(pages, layers, page, dim, formats)
    kernels = GroupKernels(PagedGroup("bf16", page, PAGES, HEADS, planes), HOST_DEVICE.function)
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
    HOST_DEVICE.run(kernels.launches("encode", span, ours.ctypes.data, nbytes))
    np.testing.assert_array_equal(ours, theirs)
    expected, landed = np.zeros_like(pages), np.zeros_like(pages)
    GroupConverter("bf16", page, PAGES, HEADS, group_of(expected, layers, page, dim, formats)).decode(
        span, theirs.ctypes.data, nbytes
    )
    pages_there = PagedGroup("bf16", page, PAGES, HEADS, group_of(landed, layers, page, dim, formats))
    back = GroupKernels(pages_there, HOST_DEVICE.function)
    HOST_DEVICE.run(back.launches("decode", span, theirs.ctypes.data, nbytes))
    np.testing.assert_array_equal(landed, expected)


def aligned(nbytes: int) -> np.ndarray:
    data = np.full(nbytes + 16, 0xA5, np.uint8)
    start = -data.ctypes.data % 16
    return data[start : start + nbytes]


def launches_of(formats: tuple[WireFormat, ...], page: int, layers: int, tokens: int) -> list[KernelLaunch]:
    planes = group_of(np.zeros(1, np.uint16), layers, page, 16, formats)
    count = -(-tokens // page)
    kernels = GroupKernels(PagedGroup("bf16", page, count, HEADS, planes), lambda *_: 0)
    nbytes = layers * HEADS * sum(fmt.span_bytes(0, tokens, 16) for fmt in formats)
    return kernels.launches(
        "encode", Span(0, layers, 0, HEADS, 0, tokens, list(range(count))), 1 << 20, nbytes
    )


def test_a_part_is_one_launch() -> None:
    keys, values = (
        WireFormat("int4", "channel", zero_point=True),
        WireFormat("int4", "token", zero_point=True),
    )
    assert len(launches_of((keys, values), 16, 80, 1024)) == 1
    assert len(launches_of((keys, values), 16, 4, 2048)) == 1
    # Planes of two dtypes, more page ids than an argument has room for, more layers than that.
    assert len(launches_of((keys, WireFormat("bf16")), 16, 4, 2048)) == 2
    assert len(launches_of((keys, values), 1, 1, 2048)) == 4
    assert len(launches_of((keys, values), 16, 160, 2048)) == 2


def test_what_kernels_do_not_have_is_named() -> None:
    def group(order: ElementOrder, fmt: WireFormat, count: int = 1, page: int = 16) -> PagedGroup:
        planes = [ConvertedPlane(order, 4096, 16, fmt, [0], [1.0], [1.0])] * count
        return PagedGroup("bf16", page, 8, 2, planes)

    plain, packed = strided(0, 512, 32, 2), ElementOrder(0, 512, (16, 2, 512), (2, 32, 64))
    bf16 = WireFormat("bf16")
    with pytest.raises(ValueError, match=r"tokens \(16, 2, 512\).* plain strides"):
        GroupKernels(group(packed, bf16), lambda *_: 0)
    with pytest.raises(ValueError, match="5 planes, a kernel takes 4"):
        GroupKernels(group(plain, bf16, 5), lambda *_: 0)
    with pytest.raises(ValueError, match="tiles of 1024 tokens have more pages of 1 "):
        GroupKernels(group(plain, WireFormat("int4", "head", 1024), page=1), lambda *_: 0)
    with pytest.raises(KernelsUnavailable, match="no kernels to launch on devices of ascend"):
        kernel_sources("ascend")


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
def test_a_box_that_is_not_there_is_not_launched(changes: dict[str, Any], named: str) -> None:
    plane = ConvertedPlane(strided(0, 512, 32, 2), 1024, 16, WireFormat("bf16"), [0], [1.0], [1.0])
    kernels = GroupKernels(PagedGroup("bf16", 16, 8, 2, [plane]), lambda *_: 0)
    span = Span(0, 1, 0, 2, 0, 32, [1, 2])
    assert len(kernels.launches("encode", span, 0, 2048)) == 1
    with pytest.raises(ValueError, match=named):
        kernels.launches("encode", span._replace(**changes), 0, 2048)
