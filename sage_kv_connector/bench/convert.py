# SPDX-License-Identifier: Apache-2.0
"""How fast one thread converts paged KV, against a copy of the same pages and against torch.

Everything runs in one process, turn by turn, medians of the turns. A figure is GB/s of the
source in memory (bf16) whichever the direction, so that 1.0 of ``copy`` means that
conversion costs as much time as copying the pages would.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sage_kv_connector.contract.dtypes import CODE_MAX, SCALED_DTYPES
from sage_kv_connector.contract.element_order import ElementOrder, packed_cpu_planes, strided
from sage_kv_connector.format.converter import ConvertedPlane, GroupConverter, Span, tile_kernels
from sage_kv_connector.format.defaults import default_format
from sage_kv_connector.format.reference import encode_tile, to_float
from sage_kv_connector.format.wire_format import WireFormat, tile_tokens

HEADS, PAGE_TOKENS, DIM = 4, 128, 128
PAGE_BYTES = 2 * HEADS * PAGE_TOKENS * DIM * 2
#: torch is slow: it converts this much of the source, and its speed is per byte.
TORCH_BYTES = 64 << 20
LAYOUTS = ("rows", "cpu-vec", "cpu-amx")


class _Paged(NamedTuple):
    """``data[page]`` holds K and V of all heads of one page, bf16."""

    data: npt.NDArray[np.uint8]
    span: Span
    orders: tuple[ElementOrder, ElementOrder]

    def converter(self, formats: tuple[WireFormat, WireFormat], kernels: str = "") -> GroupConverter:
        base = [int(self.data.ctypes.data)]
        planes = [
            ConvertedPlane(order, PAGE_BYTES, DIM, fmt, base, [1.0], [1.0])
            for order, fmt in zip(self.orders, formats, strict=True)
        ]
        return GroupConverter("bf16", PAGE_TOKENS, len(self.data), HEADS, planes, kernels)


def bench_convert(total_bytes: int, layout: str, repeats: int, *, with_torch: bool) -> dict[str, Any]:
    """Encode and decode with the default formats. Raises ValueError for an unknown layout."""
    paged = _make_pages(max(2, total_bytes // PAGE_BYTES), layout)
    wire = np.zeros(paged.data.nbytes, np.uint8)
    results: dict[str, Any] = {}
    if with_torch:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    for dtype in (*SCALED_DTYPES, "bf16"):
        formats = (default_format(dtype, "k"), default_format(dtype, "v"))
        converter = paged.converter(formats)
        length = converter.wire_bytes(paged.span)
        address = int(wire.ctypes.data)
        runs: dict[str, Callable[[], object]] = {
            "copy": partial(_copy_pages, paged, wire),
            "encode": partial(converter.encode, paged.span, address, length),
            "decode": partial(converter.decode, paged.span, address, length),
        }
        seconds = _interleaved(runs, repeats)
        identical = _bit_identical(paged, formats)
        torch_speed = _torch_speeds(dtype) if with_torch and dtype != "bf16" else {}
        copy = paged.data.nbytes / seconds["copy"] / 1e9
        for direction in ("encode", "decode"):
            speed = paged.data.nbytes / seconds[direction] / 1e9
            known = torch_speed.get(direction, {})
            results[f"{direction} bf16 {dtype}"] = {
                "gbytes_per_s_of_source": round(speed, 3),
                "copy_gbytes_per_s": round(copy, 3),
                "ratio_to_copy": round(speed / copy, 3),
                "torch_eager_ratio": round(speed / known["eager"], 1) if known else None,
                "torch_compile_ratio": round(speed / known["compiled"], 1) if known.get("compiled") else None,
                "bit_identical": identical,
            }
    return {
        "total_bytes": int(paged.data.nbytes),
        "layout": layout,
        "page_tokens": PAGE_TOKENS,
        "kernels": paged.converter((WireFormat("bf16"),) * 2).kernels,
        "threads": 1,
        "results": results,
    }


def convert_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("source", f"{result['total_bytes'] >> 20} MiB, {result['layout']}, kernels {result['kernels']}")]
    for name, one in result["results"].items():
        text = f"{one['gbytes_per_s_of_source']:.2f} GB/s, {one['ratio_to_copy']:.2f} of copy"
        if one["torch_eager_ratio"]:
            text += f", {one['torch_eager_ratio']:.0f}x torch eager"
        if one["torch_compile_ratio"]:
            text += f", {one['torch_compile_ratio']:.1f}x torch.compile"
        rows.append((name, text + ("" if one["bit_identical"] else ", NOT bit-identical")))
    return rows


def _make_pages(pages: int, layout: str) -> _Paged:
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}, allowed: {', '.join(LAYOUTS)}")
    rng = np.random.default_rng(1)
    values = rng.normal(size=PAGE_BYTES // 2).astype(np.float32).view(np.uint32) >> 16
    data = np.empty((pages, PAGE_BYTES), np.uint8)
    for page in range(pages):
        data[page] = np.roll(values, page).astype(np.uint16).view(np.uint8)
    plane = HEADS * PAGE_TOKENS * DIM * 2
    orders = (
        strided(0, PAGE_TOKENS * DIM * 2, DIM * 2, 2),
        strided(plane, PAGE_TOKENS * DIM * 2, DIM * 2, 2),
    )
    if layout != "rows":
        packed = packed_cpu_planes(layout, 2, PAGE_TOKENS, DIM)
        assert packed is not None
        orders = packed
    table = [int(page) for page in rng.permutation(pages)]
    return _Paged(data, Span(0, 1, 0, HEADS, 0, pages * PAGE_TOKENS, table), orders)


def _copy_pages(paged: _Paged, wire: npt.NDArray[np.uint8]) -> None:
    target = wire.reshape(paged.data.shape)
    for place, page in enumerate(paged.span.pages):
        target[place] = paged.data[page]


def _interleaved(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taken in turn so that noise meets all alike; the first turn warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _bit_identical(paged: _Paged, formats: tuple[WireFormat, WireFormat]) -> bool:
    """The first tiles against the reference, and everything against every other instruction set."""
    span = paged.span
    wires = []
    for kernels in tile_kernels():
        converter = paged.converter(formats, kernels)
        wires.append(np.zeros(converter.wire_bytes(span), np.uint8))
        converter.encode(span, int(wires[-1].ctypes.data), len(wires[-1]))
    if any(not np.array_equal(wire, wires[0]) for wire in wires):
        return False
    count = tile_tokens(0, PAGE_TOKENS, formats[0].group_tokens)[0]
    order = paged.orders[0]
    tokens, channels = np.arange(count), np.arange(DIM)
    token = (tokens % order.token[0]) * order.token[1] + (tokens // order.token[0]) * order.token[2]
    channel = (channels % order.channel[0]) * order.channel[1] + (
        channels // order.channel[0]
    ) * order.channel[2]
    raw = paged.data[span.pages[0]].view(np.uint16)[(order.offset + token[:, None] + channel[None, :]) // 2]
    tile = encode_tile(to_float(raw, "bf16"), formats[0])
    return bool(np.array_equal(wires[0][: len(tile)], tile))


def _torch_speeds(dtype: str) -> dict[str, dict[str, float]]:
    """GB/s of bf16 source of the same arithmetic in torch, eager and compiled, one thread; contiguous source."""
    import torch

    torch.set_num_threads(1)
    groups = TORCH_BYTES // (64 * DIM * 2)
    source = torch.randn(groups, 64, DIM).to(torch.bfloat16)
    float8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}.get(dtype)
    largest = CODE_MAX[dtype]

    def encode(values: Any) -> Any:
        wide = values.float()
        scale = wide.abs().amax(2, keepdim=True) / largest
        steps = wide / scale.clamp(min=1e-30)
        if float8 is not None:
            return steps.clamp(-largest, largest).to(float8), scale
        codes = steps.round().clamp(-7, 7).to(torch.int8)
        return (codes[..., 0::2] & 15) | (codes[..., 1::2] << 4), scale

    def decode(codes: Any, scale: Any) -> Any:
        if float8 is not None:
            return (codes.float() * scale).to(torch.bfloat16)
        low, high = (codes << 4) >> 4, codes >> 4
        plain = torch.stack([low, high], dim=-1).flatten(-2)
        return (plain.float() * scale).to(torch.bfloat16)

    coded = encode(source)
    found: dict[str, dict[str, float]] = {}
    for name, call, given in (("encode", encode, (source,)), ("decode", decode, coded)):
        found[name] = {"eager": _speed(call, given, source.nbytes)}
        try:
            found[name]["compiled"] = _speed(torch.compile(call), given, source.nbytes)
        except Exception as error:  # a machine without a compiler for torch
            found[name]["compiled"] = 0.0
            del error
    return found


def _speed(call: Callable[..., Any], given: Any, nbytes: int) -> float:
    return nbytes / _interleaved({"call": lambda: call(*given)}, 3)["call"] / 1e9
