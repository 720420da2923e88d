# SPDX-License-Identifier: Apache-2.0
"""Write the golden vectors that every conversion kernel must reproduce (kernels/golden/*.npz).

One file a wire dtype. For each format, memory dtype and shape there is an input tile
(raw bits), its encoding, and what that encoding decodes to in each memory dtype. The
vectors are frozen: a change of this file's output is a change of the wire format.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np

from sage_kv_connector.contract.dtypes import CAST_DTYPES, CONVERTIBLE_DTYPES, SCALED_DTYPES, dtype
from sage_kv_connector.format.reference import RAW, decode_tile, encode_tile, from_float, to_float
from sage_kv_connector.format.wire_format import Granularity, WireFormat

OUT = Path(__file__).parent.parent / "kernels" / "golden"
SHAPES = ((24, 32), (5, 16))
TENSOR_SCALE = 0.37


def formats() -> list[WireFormat]:
    """Every format of every wire dtype."""
    found = [WireFormat(dtype) for dtype in CAST_DTYPES]
    granularities: tuple[Granularity, ...] = get_args(Granularity)
    for name in SCALED_DTYPES:
        integer, offsets = (
            dtype(name).kind == "integer",
            (False, True) if dtype(name).zero_point else (False,),
        )
        for granularity, zero_point in itertools.product(granularities[2 if integer else 0 :], offsets):
            found.append(WireFormat(name, granularity, zero_point=zero_point))
    return found


def adversarial(rng: np.random.Generator, tokens: int, dim: int) -> np.ndarray:
    """Normal values with an outlier channel, a constant one, denormals, huge values, ±Inf, NaN and -0."""
    values = rng.normal(size=(tokens, dim)).astype(np.float32)
    values[:, 1] *= 300
    values[:, 2] = 5.0
    values[:, 3] = 0.0
    values[:, 4] *= np.float32(1e-40)
    values[:, 5] = np.clip(values[:, 5].astype(np.float64) * 2e38, -3.4e38, 3.4e38)
    values[:, 6] *= np.float32(2.0**-14)
    values[0, 7], values[1, 7], values[2, 8], values[3, 9] = np.inf, -np.inf, np.nan, -0.0
    values[4, 10:14] = (464.0, -448.1, 65519.9, -1e6)
    values[:, 14] = np.inf
    values[:, 15] = 448.0 * np.arange(tokens) / max(1, tokens - 1)
    return values


def main() -> int:
    OUT.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(20240229)
    files: dict[str, dict[str, Any]] = {}
    for number, (fmt, memory, (tokens, dim)) in enumerate(
        itertools.product(formats(), CONVERTIBLE_DTYPES, SHAPES)
    ):
        vectors = files.setdefault(fmt.dtype, {})
        plain = rng.normal(size=(tokens, dim)).astype(np.float32)
        raw = from_float(adversarial(rng, tokens, dim) if number % 2 or tokens == 24 else plain, memory)
        scale = TENSOR_SCALE if fmt.granularity == "tensor" else 1.0
        tile = encode_tile(to_float(raw, memory), fmt, scale)
        key = f"{number}"
        vectors[f"{key}.format"] = np.frombuffer(msgspec.json.encode(fmt), np.uint8)
        vectors[f"{key}.dtype"] = np.frombuffer(memory.encode(), np.uint8)
        vectors[f"{key}.tensor_scale"] = np.float32(scale)
        vectors[f"{key}.memory"] = raw
        vectors[f"{key}.tile"] = tile
        values = decode_tile(tile, fmt, tokens, dim, scale)
        for target in RAW:
            vectors[f"{key}.decoded.{target}"] = from_float(values, target)
    for name, vectors in files.items():
        np.savez_compressed(OUT / f"{name}.npz", **vectors)
        print(f"{name}: {len(vectors)} arrays, {(OUT / f'{name}.npz').stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
