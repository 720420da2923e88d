# SPDX-License-Identifier: Apache-2.0
"""What weights are is told from their files, however these are cut, named or placed."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sage_kv_connector.integrations.common.weight_files import weights_digest

Tensors = dict[str, np.ndarray[Any, Any]]


def tensors(seed: int = 0) -> Tensors:
    rng = np.random.default_rng(seed)
    return {f"layer{i}.weight": rng.normal(size=(64, 33)).astype(np.float32) for i in range(4)}


def save(path: Path, content: Tensors) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in content.items():
        places = [len(data), len(data) + tensor.nbytes]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": places}
        data += tensor.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def model(folder: Path, content: Tensors, config: dict[str, Any] | None = None) -> str:
    folder.mkdir()
    save(folder / "model.safetensors", content)
    (folder / "config.json").write_text(json.dumps(config or {"hidden_size": 33}))
    return weights_digest(folder)


def test_the_same_weights_cut_into_files_elsewhere_are_the_same(tmp_path: Path) -> None:
    content = tensors()
    whole = model(tmp_path / "whole", content, {"hidden_size": 33, "_name_or_path": "a", "dtype": "float32"})
    cut = tmp_path / "cut"
    cut.mkdir()
    names = list(content)
    save(cut / "b.safetensors", {name: content[name] for name in names[:1]})
    save(cut / "a.safetensors", {name: content[name] for name in names[1:]})
    (cut / "config.json").write_text(json.dumps({"_name_or_path": "b", "hidden_size": 33}))
    assert whole == weights_digest(cut)
    assert len(whole) == 32


def test_other_weights_names_shapes_and_configs_are_others(tmp_path: Path) -> None:
    content = tensors()
    last = dict(content)
    last["layer3.weight"] = content["layer3.weight"].copy()
    last["layer3.weight"][-1, -1] += 1
    renamed = {name.replace("layer0", "layer9"): tensor for name, tensor in content.items()}
    reshaped = {name: tensor.reshape(33, 64) for name, tensor in content.items()}
    found = [
        model(tmp_path / "0", content),
        model(tmp_path / "1", tensors(seed=1)),
        model(tmp_path / "2", last),
        model(tmp_path / "3", renamed),
        model(tmp_path / "4", reshaped),
        model(tmp_path / "5", content, {"hidden_size": 33, "rope_theta": 5}),
    ]
    assert len(set(found)) == len(found)


def test_weights_replaced_in_place_are_others(tmp_path: Path) -> None:
    before = model(tmp_path / "m", tensors())
    save(tmp_path / "m" / "model.safetensors", tensors(seed=2))
    assert weights_digest(tmp_path / "m") != before


def test_files_of_other_formats_count_as_well(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(range(256)) * 40)
    before = weights_digest(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(range(256)) * 39 + bytes(256))
    assert weights_digest(tmp_path) != before != ""


def test_no_weights_are_no_digest(tmp_path: Path) -> None:
    assert weights_digest(tmp_path) == ""
    assert weights_digest(tmp_path / "absent") == ""


def header(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\1\2",
        struct.pack("<Q", 1 << 60),
        header("{"),
        header("[]"),
        header('{"a": 1}'),
        header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}}'),
        header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}'),
        header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": ["x", 0]}}'),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        weights_digest(tmp_path)
