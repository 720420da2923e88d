# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels equal the reference bit for bit: golden vectors, and random page tables and orders."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_kv_connector.contract.dtypes import CONVERTIBLE_DTYPES, WIRE_DTYPES
from sage_kv_connector.contract.element_order import ElementOrder, packed_cpu_planes, strided
from sage_kv_connector.format.converter import Span, tile_kernels
from sage_kv_connector.format.reference import RAW, encode_tile, from_float, to_float
from sage_kv_connector.format.wire_format import Granularity, WireFormat
from sage_kv_connector.kernels.golden import golden_vectors
from tests.kernels.paged_memory import PagedMemory, reference_elements, reference_wire

KERNELS = tile_kernels()


def one_page(dtype: str, raw: np.ndarray) -> tuple[PagedMemory, Span]:
    tokens, dim = raw.shape
    item = np.dtype(RAW[dtype]).itemsize
    order = strided(0, tokens * dim * item, dim * item, item)
    memory = PagedMemory(
        dtype, order, heads=1, page_size=tokens, dim=dim, pages=1, page_bytes=tokens * dim * item, layers=1
    )
    memory.data[0, 0] = np.ascontiguousarray(raw).view(np.uint8).reshape(-1)
    return memory, Span(0, 1, 0, 1, 0, tokens, [0])


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
def test_golden_vectors(kernels: str, wire_dtype: str) -> None:
    for vector in golden_vectors(wire_dtype):
        memory, span = one_page(vector.dtype, vector.memory)
        converter = memory.converter(vector.format, 1.0, vector.tensor_scale, kernels)
        wire = np.full(len(vector.tile), 0xAA, np.uint8)
        assert converter.wire_bytes(span) == len(wire)
        converter.encode(span, wire.ctypes.data, len(wire))
        np.testing.assert_array_equal(
            wire, vector.tile, err_msg=f"{vector.name} {vector.format} {vector.dtype}"
        )
        for dtype, expected in vector.decoded.items():
            target, span = one_page(dtype, np.zeros(vector.memory.shape, RAW[dtype]))
            target.converter(vector.format, 1.0, vector.tensor_scale, kernels).decode(
                span, wire.ctypes.data, len(wire)
            )
            np.testing.assert_array_equal(
                target.elements(span, 0, 0), expected, err_msg=f"{vector.name} {vector.format} to {dtype}"
            )


def orders(item: int, heads: int, page_size: int, dim: int) -> dict[str, tuple[ElementOrder, int]]:
    """Name → (order, bytes of a page)."""
    whole = 2 * heads * page_size * dim * item
    found = {
        "hnd": (strided(0, page_size * dim * item, dim * item, item), whole),
        "nhd": (strided(0, dim * item, heads * dim * item, item), whole),
        "fused nhd": (strided(dim * item, 2 * dim * item, 2 * heads * dim * item, item), whole),
        "element by element": (strided(0, item, heads * dim * item, heads * item), whole),
    }
    for packing in ("cpu-vec", "cpu-amx"):
        planes = packed_cpu_planes(packing, item, page_size, dim)
        if planes is not None:
            found[f"{packing} k"], found[f"{packing} v"] = (planes[0], whole), (planes[1], whole)
    return found


@settings(max_examples=150)
@given(data=st.data())
def test_gather_convert_scatter_over_random_page_tables(data: st.DataObject) -> None:
    source_dtype = data.draw(st.sampled_from(CONVERTIBLE_DTYPES))
    target_dtype = data.draw(st.sampled_from(CONVERTIBLE_DTYPES))
    wire_dtype = data.draw(st.sampled_from(WIRE_DTYPES))
    granularity: Granularity = "none"
    if wire_dtype not in ("fp32", "fp16", "bf16"):
        choices: list[Granularity] = ["channel", "token", "head"]
        if wire_dtype != "int4":
            choices += ["none", "tensor"]
        granularity = data.draw(st.sampled_from(choices))
    zero_point = wire_dtype == "int4" and data.draw(st.booleans())
    fmt = WireFormat(wire_dtype, granularity, data.draw(st.sampled_from([4, 16, 24, 64])), zero_point)
    dim = data.draw(st.sampled_from([16, 20, 48, 64, 144]))
    first_token, tokens = data.draw(st.integers(0, 50)), data.draw(st.integers(1, 90))
    heads, layers = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    first_head = data.draw(st.integers(0, heads - 1))
    span_heads = data.draw(st.integers(1, heads - first_head))
    kernels = data.draw(st.sampled_from(KERNELS))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    wire_scale = 0.37 if granularity == "tensor" else 1.0

    def side(dtype: str, memory_scale: float) -> tuple[PagedMemory, Span]:
        item = np.dtype(RAW[dtype]).itemsize
        page_size = data.draw(st.sampled_from([1, 5, 16, 32, 96]))
        found = orders(item, heads, page_size, dim)
        order, page_bytes = found[data.draw(st.sampled_from(sorted(found)))]
        needed = (first_token + tokens - 1) // page_size - first_token // page_size + 1
        memory = PagedMemory(
            dtype,
            order,
            heads=heads,
            page_size=page_size,
            dim=dim,
            pages=needed + 2,
            page_bytes=page_bytes,
            layers=layers,
        )
        pages = [int(page) for page in rng.permutation(needed + 2)[:needed]]
        return memory, Span(0, layers, first_head, span_heads, first_token, tokens, pages)

    source_scale, target_scale = (
        float(data.draw(st.sampled_from([1.0, 0.25, 0.3]))) if dtype.startswith("fp8") else 1.0
        for dtype in (source_dtype, target_dtype)
    )
    source, span = side(source_dtype, source_scale)
    values = rng.normal(size=source.data.size).astype(np.float32) * 4
    values[rng.integers(0, len(values), 3)] = (np.inf, np.nan, 1e30)
    raw = from_float(values, source_dtype).view(np.uint8)[: source.data.size]
    source.data[...] = raw.reshape(source.data.shape)
    same = source_dtype == wire_dtype and (granularity == "none" or source_scale == wire_scale)
    expected = reference_wire(source, span, fmt, source_scale, wire_scale)
    converter = source.converter(fmt, source_scale, wire_scale, kernels)
    wire = np.zeros(converter.wire_bytes(span), np.uint8)
    converter.encode(span, wire.ctypes.data, len(wire))
    if not same:
        np.testing.assert_array_equal(wire, expected)
    target, target_span = side(target_dtype, target_scale)
    target.data[...] = 0x55
    untouched = target.data.copy()
    found = reference_elements(wire, target, target_span, fmt, target_scale, wire_scale)
    if target_dtype == wire_dtype and (granularity == "none" or target_scale == wire_scale):
        found = {}
        if same and granularity in ("none", "tensor"):
            found = {
                (layer, head): source.elements(span, layer, head)
                for layer in range(layers)
                for head in range(first_head, first_head + span_heads)
            }
    target.converter(fmt, target_scale, wire_scale, kernels).decode(target_span, wire.ctypes.data, len(wire))
    for (layer, head), bits in found.items():
        np.testing.assert_array_equal(target.elements(target_span, layer, head), bits)
        untouched_bits = np.zeros_like(bits)
        target.fill(target_span, layer, head, untouched_bits)
    if len(found) == layers * span_heads:
        check = target.data.copy()
        target.data[...] = untouched
        for layer, head in found:
            target.fill(target_span, layer, head, np.zeros((tokens, dim), RAW[target_dtype]))
        np.testing.assert_array_equal(check, target.data, err_msg="bytes outside the span were written")


def test_every_pair_of_pages_and_packings_keeps_equal_bits() -> None:
    """No conversion of elements: page 128 of one packing to page 96 of the other and back, bf16."""
    rng = np.random.default_rng(3)
    dim, heads, tokens = 64, 2, 300
    for source_name, source_page in (("cpu-vec", 128), ("cpu-amx", 96)):
        for target_name, target_page in (("cpu-amx", 128), ("cpu-vec", 32)):
            for plane in (0, 1):
                sides = []
                for name, page_size in ((source_name, source_page), (target_name, target_page)):
                    planes = packed_cpu_planes(name, 2, page_size, dim)
                    assert planes is not None
                    count = -(-tokens // page_size)
                    memory = PagedMemory(
                        "bf16",
                        planes[plane],
                        heads=heads,
                        page_size=page_size,
                        dim=dim,
                        pages=count,
                        page_bytes=2 * heads * page_size * dim * 2,
                        layers=1,
                    )
                    sides.append((memory, Span(0, 1, 0, heads, 0, tokens, list(range(count))[::-1])))
                (source, from_span), (target, to_span) = sides
                source.data[...] = rng.integers(0, 256, source.data.shape)
                fmt = WireFormat("bf16")
                converter = source.converter(fmt)
                wire = np.zeros(converter.wire_bytes(from_span), np.uint8)
                converter.encode(from_span, wire.ctypes.data, len(wire))
                target.converter(fmt).decode(to_span, wire.ctypes.data, len(wire))
                for head in range(heads):
                    np.testing.assert_array_equal(
                        source.elements(from_span, 0, head), target.elements(to_span, 0, head)
                    )


def test_to_float_of_every_code_is_what_the_kernels_widen() -> None:
    for dtype in ("fp8_e4m3", "fp8_e5m2", "fp16", "bf16"):
        bits = 8 * np.dtype(RAW[dtype]).itemsize
        codes = np.arange(1 << bits).astype(RAW[dtype]).reshape(-1, 256)
        memory, span = one_page(dtype, codes)
        for kernels in KERNELS:
            wire = np.zeros(codes.size * 4, np.uint8)
            memory.converter(WireFormat("fp32"), kernels=kernels).encode(span, wire.ctypes.data, len(wire))
            np.testing.assert_array_equal(
                wire.view(np.uint32), from_float(to_float(codes, dtype), "fp32").reshape(-1)
            )


def test_errors_name_the_argument_its_value_and_what_is_allowed() -> None:
    memory, span = one_page("bf16", np.zeros((8, 16), np.uint16))
    converter = memory.converter(WireFormat("fp8_e4m3", "channel"))
    for change, message in (
        ({"layers": 2}, "layers is 2, allowed: 1 to 1"),
        ({"first_head": 1}, "first_head is 1, allowed: 0 to 0"),
        ({"pages": [1]}, "page is 1, allowed: 0 to 0"),
        ({"pages": [0, 0]}, "pages count is 2, allowed: 1"),
        ({"tokens": 0}, "tokens is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            converter.wire_bytes(span._replace(**change))
    wire = np.zeros(8, np.uint8)
    with pytest.raises(ValueError, match="wire_length is 8, the span has"):
        converter.encode(span, wire.ctypes.data, len(wire))
    with pytest.raises(ValueError, match="kernels is 'sse9'"):
        memory.converter(WireFormat("bf16"), kernels="sse9")


@settings(max_examples=60)
@given(data=st.data())
def test_rows_of_wide_dims_round_as_the_reference_does(data: st.DataObject) -> None:
    """bf16 rows of whole vectors take a way of their own; magnitudes reach down to the codes' denormals."""
    fmt = data.draw(
        st.sampled_from(
            [
                WireFormat(dtype, granularity, 64, zero)
                for dtype, zero in (("fp8_e4m3", False), ("fp8_e5m2", False), ("int4", False), ("int4", True))
                for granularity in ("token", "channel", "head")
            ]
        )
    )
    dim, tokens = data.draw(st.sampled_from([32, 64, 96, 128, 160])), data.draw(st.integers(1, 64))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    spread = data.draw(st.sampled_from([0, 4, 20, 60]))
    values = rng.normal(size=(tokens, dim)) * np.exp2(rng.integers(-spread, 1, (tokens, dim)))
    values = np.clip(values * 2.0 ** data.draw(st.sampled_from([-110, -20, 0, 90, 127])), -3e38, 3e38)
    if data.draw(st.booleans()):
        values = np.round(values * 16) / 16  # ties
    raw = from_float(values.astype(np.float32), "bf16")
    expected = encode_tile(to_float(raw, "bf16"), fmt)
    for kernels in KERNELS:
        memory, span = one_page("bf16", raw)
        wire = np.full(len(expected), 0xAA, np.uint8)
        memory.converter(fmt, 1.0, 1.0, kernels).encode(span, wire.ctypes.data, len(wire))
        np.testing.assert_array_equal(wire, expected, err_msg=f"{kernels} {fmt}")
