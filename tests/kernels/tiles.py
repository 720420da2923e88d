# SPDX-License-Identifier: Apache-2.0
"""What the kernel tests share: golden vectors, random planes in pages, comparisons."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import strategies as st

from sage_kv_connector.contract.dtypes import ENGINE_SCALED_DTYPES, WIRE_DTYPES
from sage_kv_connector.format.reference import RAW, decode_tile, encode_tile, from_float, to_float
from sage_kv_connector.format.wire_format import WireFormat, tile_tokens
from sage_kv_connector.kernels.golden import GoldenVector, golden_vectors
from sage_kv_connector.kernels.plane import KVPlane, Range
from sage_kv_connector.kernels.registry import DeviceKernels

KERNELS = Path(__file__).parents[2] / "kernels"


@cache
def all_golden_vectors() -> tuple[GoldenVector, ...]:
    return tuple(vector for dtype in WIRE_DTYPES for vector in golden_vectors(dtype))


def host_library(source: Path, output: Path, *options: str | Path) -> Path:
    """Compile ``source`` with the C++ compiler into a shared library; skips where there is none."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    command = [compiler, "-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    command += [
        "-Wno-unknown-pragmas",
        "-shared",
        "-fPIC",
        *map(str, options),
        "-o",
        str(output),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


def passed(library: ctypes.CDLL, name: str, argument: bytes) -> Any:
    """What a host kernel is called with: the argument, or where that is too long for a device, its address."""
    nbytes = ctypes.c_uint.in_dll(library, f"{name}_argument_bytes").value
    if nbytes == len(argument):
        return argument
    assert nbytes == ctypes.sizeof(ctypes.c_void_p)
    return (ctypes.c_char_p * 1)(argument)


class PagedCase(NamedTuple):
    """Random pages and what the reference makes of them.

    ``store`` holds all pages as a 1-D array of raw elements; ``starts`` are the offsets
    of a request's pages in it, ``strides`` (head, token, dim), both in elements.
    """

    fmt: WireFormat
    dtype: str
    store: np.ndarray
    starts: np.ndarray
    strides: tuple[int, int, int]
    page_tokens: int
    dim: int
    tokens: Range
    heads: Range
    memory_scale: float
    wire_scale: float

    def element_offsets(self, head: int) -> np.ndarray:
        """Offsets in ``store`` of one head's elements of all tokens, shape (tokens, dim)."""
        place = np.arange(self.tokens.first, self.tokens.first + self.tokens.length)
        rows = self.starts[place // self.page_tokens] + place % self.page_tokens * self.strides[1]
        offsets: np.ndarray = rows[:, None] + head * self.strides[0] + np.arange(self.dim) * self.strides[2]
        return offsets

    def tiles(self) -> list[tuple[int, int, int]]:
        """(head, first token of the span, tokens) of each tile in wire order."""
        found, first = [], 0
        for count in tile_tokens(self.tokens.first, self.tokens.length, self.fmt.group_tokens):
            found += [(self.heads.first + head, first, count) for head in range(self.heads.length)]
            first += count
        return found

    def encoded(self) -> np.ndarray:
        """The reference's wire bytes."""
        parts = []
        for head, first, count in self.tiles():
            values = to_float(self.store[self.element_offsets(head)[first : first + count]], self.dtype)
            if self.dtype in ENGINE_SCALED_DTYPES:
                values = values * np.float32(self.memory_scale)
            parts.append(encode_tile(values, self.fmt, self.wire_scale))
        return np.concatenate(parts)

    def decoded(self, wire: np.ndarray, store: np.ndarray) -> np.ndarray:
        """``store`` after the reference decoded ``wire`` into it."""
        store, at = store.copy(), 0
        for head, first, count in self.tiles():
            size = self.fmt.tile_bytes(count, self.dim)
            values = decode_tile(wire[at : at + size], self.fmt, count, self.dim, self.wire_scale)
            if self.dtype in ENGINE_SCALED_DTYPES:
                values = values * (np.float32(1) / np.float32(self.memory_scale))
            store[self.element_offsets(head)[first : first + count]] = from_float(values, self.dtype)
            at += size
        return store


def paged_case(seed: int, fmt: WireFormat, dtype: str) -> PagedCase:
    """Pages in shuffled places, heads or tokens first or dim strided, odd or even dims, a span with ragged ends."""
    rng = np.random.default_rng(seed)
    page_tokens, heads = int(rng.integers(1, 20)), int(rng.integers(1, 4))
    dim = int(rng.choice([1, 3, 8, 12, 16, 24, 40, 64, 128]))
    tokens = Range(int(rng.integers(0, 100)), int(rng.integers(1, 90)))
    strides = [
        (dim, heads * dim, 1),
        (page_tokens * dim, dim, 1),
        (page_tokens * dim, 1, page_tokens),
        (dim + 5, heads * (dim + 5), 1),
    ][int(rng.integers(0, 4))]
    extent = 1 + (heads - 1) * strides[0] + (page_tokens - 1) * strides[1] + (dim - 1) * strides[2]
    step = extent + int(rng.integers(0, 3)) * 8
    pages = -(-(tokens.first + tokens.length) // page_tokens)
    starts = rng.permutation(pages + 2)[:pages] * step + int(rng.choice([0, 0, 3]))
    values = rng.normal(size=(pages + 2) * step + 3) * rng.choice([1e-6, 1.0, 1.0, 300.0])
    store = from_float(values.astype(np.float32), dtype)
    specials = from_float(np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0, 0.0], np.float32), dtype)
    odd = rng.integers(0, len(store), max(1, len(store) // 50))
    store[odd] = rng.choice(specials, len(odd))
    first_head = int(rng.integers(0, heads))
    span = Range(first_head, int(rng.integers(1, heads - first_head + 1)))
    scale = 0.37 if dtype in ENGINE_SCALED_DTYPES and rng.integers(0, 2) else 1.0
    assert store.dtype == RAW[dtype]
    return PagedCase(fmt, dtype, store, starts, strides, page_tokens, dim, tokens, span, scale, 0.21)


def formats() -> st.SearchStrategy[WireFormat]:
    """Every wire format that kernels have, with any number of tokens in a group up to 70."""
    tokens = st.integers(1, 70)
    fp8 = st.sampled_from(("fp8_e4m3", "fp8_e5m2"))
    scaled = st.sampled_from(("channel", "token", "head"))
    return st.one_of(
        st.builds(WireFormat, st.sampled_from(("fp32", "fp16", "bf16")), st.just("none"), tokens),
        st.builds(WireFormat, fp8, st.one_of(st.sampled_from(("none", "tensor")), scaled), tokens),
        st.builds(WireFormat, st.just("int4"), scaled, tokens, zero_point=st.booleans()),
    )


def check_kernels_on_golden_vectors(kernels: DeviceKernels, device: str, every: int = 1) -> None:
    """All (or every n-th) golden vectors through a kernel set on one of torch's devices."""
    import torch

    for vector in all_golden_vectors()[::every]:
        tokens = len(vector.memory)
        spans = Range(0, tokens), Range(0, 1)

        def plane(raw: np.ndarray, dtype: str, scale: float = vector.tensor_scale) -> KVPlane:
            signed = {4: np.int32, 2: np.int16, 1: np.uint8}[raw.itemsize]
            pages = torch.from_numpy(raw.view(signed).copy()).to(device)
            return KVPlane(pages[None, :, None, :], [0], dtype, wire_scale=scale)

        expected = vector.tile
        wire = kernels.encode(plane(vector.memory, vector.dtype), *spans, vector.format)
        np.testing.assert_array_equal(wire.cpu().numpy(), expected, vector.name)
        for dtype, decoded in vector.decoded.items():
            target = plane(np.zeros_like(decoded), dtype)
            kernels.decode(wire, target, *spans, vector.format)
            result = target.pages[0, :, 0].cpu().numpy().view(decoded.dtype)
            np.testing.assert_array_equal(result, decoded, f"{vector.name} to {dtype}")


def check_kernels_on_pages(
    kernels: DeviceKernels, device: str, seed: int, fmt: WireFormat, dtype: str
) -> None:
    """A random request in pages through a kernel set on one of torch's devices."""
    import torch

    case = paged_case(seed, fmt, dtype)
    step = int(np.gcd.reduce(np.append(np.diff(case.starts), 0))) or 1
    base = int(case.starts.min())
    with np.errstate(all="ignore"):
        expected = case.encoded()
        garbage = np.random.default_rng(seed).integers(0, 255, len(case.store)).astype(case.store.dtype)
        scattered = case.decoded(expected, garbage)

    def plane(store: torch.Tensor) -> KVPlane:
        heads = case.heads.first + case.heads.length
        pages = int((case.starts.max() - base) // step) + 1
        strides = (step, case.strides[1], case.strides[0], case.strides[2])
        view = store.as_strided((pages, case.page_tokens, heads, case.dim), strides, base)
        table = ((case.starts - base) // step).tolist()
        return KVPlane(view, table, dtype, case.memory_scale, case.wire_scale)

    signed = {4: np.int32, 2: np.int16, 1: np.uint8}[case.store.itemsize]
    memory = torch.from_numpy(case.store.view(signed)).to(device)
    wire = kernels.encode(plane(memory), case.tokens, case.heads, fmt)
    np.testing.assert_array_equal(wire.cpu().numpy(), expected)
    target = torch.from_numpy(garbage.view(signed).copy()).to(device)
    kernels.decode(wire, plane(target), case.tokens, case.heads, fmt)
    np.testing.assert_array_equal(target.cpu().numpy().view(garbage.dtype), scattered)
