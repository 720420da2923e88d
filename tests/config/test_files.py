# SPDX-License-Identifier: Apache-2.0
"""Options in files, in layers over presets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sage_kv_connector.config import KVTransportConfig, layered, presets


def test_preset_then_file_then_words(tmp_path: Path) -> None:
    path = tmp_path / "kv_transport.yaml"
    path.write_text("preset: high-bw\nchunk-size: 65536\nlease_s: 5\n")
    config = KVTransportConfig.from_words([f"config_file={path}", "lease-s=7"])
    assert (config.preset, config.prefetch_depth) == ("high-bw", 8)  # of the preset that the file names
    assert config.chunk_size == 65536  # the file over the preset
    assert config.lease_s == 7  # the word over the file
    origins = layered({"config_file": path, "lease_s": 7}).origins
    assert origins["prefetch_depth"] == "preset high-bw"
    assert (origins["chunk_size"], origins["lease_s"]) == (str(path), "given")
    assert KVTransportConfig.load({"config_file": path, "preset": "low-latency"}).prefetch_depth == 2


@pytest.mark.parametrize("name", ["kv_transport.yaml", "config.yaml", "other.yml"])
def test_what_is_written_is_read(name: str, tmp_path: Path) -> None:
    config = KVTransportConfig.load({"preset": "wan", "host": "10.0.0.5", "secret_file": "/run/secret"})
    config.to_file(tmp_path / name)
    assert KVTransportConfig.from_file(tmp_path / name) == config


@given(
    preset=st.sampled_from(sorted(presets())),
    dtype=st.sampled_from(["auto", "bf16", "int4"]),
    depth=st.integers(1, 64),
)
def test_overrides_survive_the_file(
    tmp_path_factory: pytest.TempPathFactory, preset: str, dtype: str, depth: int
) -> None:
    path = tmp_path_factory.mktemp("options") / "kv_transport.yaml"
    config = KVTransportConfig.load({"preset": preset, "target_dtype": dtype, "prefetch_depth": depth})
    config.to_file(path)
    assert KVTransportConfig.from_file(path) == config  # target_dtype=auto is the default, and not wan's
    bare = KVTransportConfig(preset=preset)  # made without its preset's settings
    bare.to_file(path)
    assert KVTransportConfig.from_file(path) == bare


@given(
    chunk=st.integers(0, 64 << 20),
    depth=st.integers(1, 64),
    host=st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1, max_size=20),
)
def test_any_values_are_written_and_read(
    tmp_path_factory: pytest.TempPathFactory, chunk: int, depth: int, host: str
) -> None:
    path = tmp_path_factory.mktemp("options") / "config.yaml"
    path.write_text("server: {port: 1}\n")
    config = KVTransportConfig(chunk_size=chunk, prefetch_depth=depth, host=host)
    config.to_file(path)
    assert KVTransportConfig.from_file(path) == config


@pytest.mark.parametrize(
    "before",
    [
        "# the gateway's\nserver:\n  port: 80  # http\n\n"
        "kv_transport:\n  preset: low-cost\n\n  lease_s: 4\n# end\nlast: 1\n",
        "server: {port: 80}\nlast: 1\nkv_transport:\n  preset: low-cost",
        "kv_transport: {preset: low-cost}\nserver: {port: 80}\nlast: 1\n",
        "server: {port: 80}\nlast: 1",
    ],
)
def test_a_shared_file_keeps_what_is_not_ours(before: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(before)
    KVTransportConfig.load({"preset": "high-bw"}).to_file(path)
    after = yaml.safe_load(path.read_text())
    assert after["kv_transport"]["preset"] == "high-bw" and "lease_s" not in after["kv_transport"]
    assert after["server"] == {"port": 80} and after["last"] == 1
    for comment in ("# the gateway's", "# http", "# end"):
        assert (comment in before) == (comment in path.read_text())
    once = path.read_text()
    KVTransportConfig.load({"preset": "high-bw"}).to_file(path)
    assert path.read_text() == once


def test_a_block_that_can_t_be_replaced_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text('{"kv_transport": {"preset": "low-cost"}, "server": 1}\n')
    with pytest.raises(ValueError, match="'kv_transport' can't be replaced in place"):
        KVTransportConfig().to_file(path)
    assert '"low-cost"' in path.read_text()


def test_secrets_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name a secret_file"):
        KVTransportConfig.load({"secret": "mine"}).to_file(tmp_path / "kv_transport.yaml")
    assert not (tmp_path / "kv_transport.yaml").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "can't be read: No such file"),
        ("a: [", "is not YAML"),
        ("- a\n", "holds list; it must be a mapping"),
        ("chunk_sizes: 1\n", "chunk_sizes"),
        (
            "preset: fast\n",
            "preset is .fast. .from .*kv_transport.yaml.; allowed: high-bw, low-cost, low-latency, wan",
        ),
        ("config_file: other.yaml\n", "names another config_file"),
        ("kv_transport: 3\n", "kv_transport is int; it must be a mapping"),
    ],
)
def test_bad_files_are_named(text: str | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "kv_transport.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=says):
        KVTransportConfig.load({"config_file": path})


def test_a_shared_file_without_our_section_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("server: 1\n")
    with pytest.raises(ValueError, match="has no section 'kv_transport'; it has: server"):
        KVTransportConfig.from_file(path)


def test_presets_are_whole() -> None:
    shipped: dict[str, Any] = presets()
    assert set(shipped) == {"high-bw", "low-latency", "low-cost", "wan"}
    for name, one in shipped.items():
        assert set(one) == {"goal", "hardware", "why", "settings"}, name
        assert one["hardware"] and KVTransportConfig.load({"preset": name})
        lossy = one["settings"].get("target_dtype", "auto") != "auto"
        assert lossy == ("accuracy" in one["why"]), f"{name}: a trade-off is said where there is one"
