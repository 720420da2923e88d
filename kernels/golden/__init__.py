# SPDX-License-Identifier: Apache-2.0
"""Frozen input and output tiles of every wire format, written by scripts/make_golden.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from sage_kv_connector.format.wire_format import WireFormat


class GoldenVector(NamedTuple):
    """One tile: raw bits in ``dtype``, shape (tokens, dim); its encoding; that decoded to each memory dtype."""

    name: str
    format: WireFormat
    dtype: str
    tensor_scale: float
    memory: np.ndarray
    tile: np.ndarray
    decoded: dict[str, np.ndarray]


def golden_vectors(wire_dtype: str) -> Iterator[GoldenVector]:
    """All vectors of one wire dtype."""
    with np.load(Path(__file__).parent / f"{wire_dtype}.npz") as file:
        vectors = dict(file)
    for key in [key for key in vectors if key.endswith(".format")]:
        name = key.partition(".")[0]
        fmt = msgspec.json.decode(vectors[key].tobytes(), type=WireFormat)
        marker = f"{name}.decoded."
        decoded = {k.removeprefix(marker): v for k, v in vectors.items() if k.startswith(marker)}
        yield GoldenVector(
            f"{wire_dtype}-{name}",
            fmt,
            vectors[f"{name}.dtype"].tobytes().decode(),
            float(vectors[f"{name}.tensor_scale"]),
            vectors[f"{name}.memory"],
            vectors[f"{name}.tile"],
            decoded,
        )
