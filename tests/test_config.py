# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from sage_kv_connector.config import KVTransportConfig, presets


def test_words_are_options_and_presets_lie_below_them() -> None:
    config = KVTransportConfig.from_words(["preset=low-latency", "overlap-streams=3", "host=127.0.0.1"])
    assert config.overlap_streams == 3
    assert config.chunk_size == presets()["low-latency"]["settings"]["chunk_size"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"chunk_sizes": 1}, "chunk_sizes"),
        ({"backend": "carrier-pigeon"}, "backend is 'carrier-pigeon'.*allowed: auto, "),
        ({"lease_s": -1}, "lease_s"),
        ({"preset": "fast"}, "preset is 'fast' .from given.; allowed: high-bw, low-cost, low-latency, wan"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        KVTransportConfig.load(options)


def test_every_preset_is_valid() -> None:
    assert len(presets()) >= 3
    for name, preset in presets().items():
        assert preset["goal"] and preset["why"]
        KVTransportConfig.load({"preset": name})


def test_secret_comes_from_config_environment_or_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SAGE_KVT_SECRET", raising=False)
    monkeypatch.delenv("SAGE_KVT_SECRET_FILE", raising=False)
    assert KVTransportConfig().resolved_secret() == b""
    path = tmp_path / "secret"
    path.write_text("from-file\n")
    monkeypatch.setenv("SAGE_KVT_SECRET_FILE", str(path))
    assert KVTransportConfig().resolved_secret() == b"from-file"
    monkeypatch.setenv("SAGE_KVT_SECRET", "from-env")
    assert KVTransportConfig().resolved_secret() == b"from-env"
    assert KVTransportConfig.load({"secret": "mine"}).resolved_secret() == b"mine"
    assert "mine" not in repr(KVTransportConfig.load({"secret": "mine"}))


def test_unreadable_or_empty_secret_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="can't be read"):
        KVTransportConfig.load({"secret_file": tmp_path / "none"}).resolved_secret()
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        KVTransportConfig.load({"secret_file": tmp_path / "empty"}).resolved_secret()
