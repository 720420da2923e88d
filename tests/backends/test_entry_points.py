# SPDX-License-Identifier: Apache-2.0
"""A third party's backend whose code is broken: named when it is asked for, and the others still serve."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from sage_kv_connector import backends

#: What a module may hold, and what is said of it.
BROKEN = {
    "raise OSError('libcarrier.so: cannot open shared object file')": "OSError: libcarrier.so: cannot open",
    "class Backend(": "SyntaxError",
    "class Backend: pass": "AttributeError: .* has no attribute 'capabilities'",
    "class Backend: capabilities = property(lambda self: None)": "TypeError: capabilities is <property",
}


@pytest.fixture
def ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Install ``carrier``, whose module has this text."""

    def install(text: str) -> None:
        (tmp_path / "a_broken_carrier.py").write_text(text)
        importlib.invalidate_caches()
        found = [EntryPoint("carrier", "a_broken_carrier:Backend", backends.ENTRY_POINTS)]
        monkeypatch.setattr(backends, "entry_points", lambda group: found)
        backends._homes.cache_clear()

    monkeypatch.syspath_prepend(tmp_path)
    yield install
    backends._homes.cache_clear()
    sys.modules.pop("a_broken_carrier", None)


@pytest.mark.parametrize(("text", "says"), BROKEN.items(), ids=["raises", "syntax", "bare", "property"])
def test_broken_code_is_named_and_left_out(
    ship: Callable[[str], None], caplog: pytest.LogCaptureFixture, text: str, says: str
) -> None:
    ship(text)
    ours = [name for name in backends.backend_names() if name != "carrier"]
    assert sorted(backends.ranked_backends()) == sorted(ours)
    assert "backend 'carrier': the entry point 'a_broken_carrier:Backend' of" in caplog.text
    with pytest.raises(ValueError, match=f"a_broken_carrier:Backend' of .* can't be loaded: {says}"):
        backends.backend_class("carrier")


def test_the_metadata_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []

    def none_are_there(group: str) -> list[EntryPoint]:
        reads.append(group)
        return []

    monkeypatch.setattr(backends, "entry_points", none_are_there)
    backends._homes.cache_clear()
    for _ in range(3):
        backends.backend_names()
        backends.ranked_backends()
    assert reads == [backends.ENTRY_POINTS]
    backends._homes.cache_clear()
