# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from sage_kv_connector.contract.dtypes import WIRE_DTYPES
from sage_kv_connector.format.reference import RAW, decode_tile, encode_tile, from_float, to_float
from sage_kv_connector.format.wire_format import WireFormat
from scripts import make_golden


@pytest.mark.parametrize("dtype", WIRE_DTYPES)
def test_the_reference_reproduces_the_golden_vectors(dtype: str) -> None:
    vectors = np.load(make_golden.OUT / f"{dtype}.npz")
    names = [name.split(".")[0] for name in vectors.files if name.endswith(".tile")]
    assert names
    for name in names:
        fmt = msgspec.json.decode(vectors[f"{name}.format"].tobytes(), type=WireFormat)
        memory, scale = vectors[f"{name}.memory"], float(vectors[f"{name}.tensor_scale"])
        values = to_float(memory, vectors[f"{name}.dtype"].tobytes().decode())
        tile = encode_tile(values, fmt, scale)
        np.testing.assert_array_equal(tile, vectors[f"{name}.tile"])
        back = decode_tile(tile, fmt, len(memory), memory.shape[1], scale)
        for target in RAW:
            np.testing.assert_array_equal(from_float(back, target), vectors[f"{name}.decoded.{target}"])


def test_the_script_writes_the_golden_vectors_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = make_golden.OUT
    monkeypatch.setattr(make_golden, "OUT", tmp_path)
    assert make_golden.main() == 0
    for path in sorted(frozen.glob("*.npz")):
        old, new = np.load(path), np.load(tmp_path / path.name)
        assert old.files == new.files
        for name in old.files:
            np.testing.assert_array_equal(old[name], new[name], err_msg=f"{path.name}: {name}")
