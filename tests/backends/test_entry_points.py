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
from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.doctor import examine
from sage_kv_connector.doctor.finding import Finding
from sage_kv_connector.engine.control.reachability import enabled_backends

#: What a module may hold, and what is said of it.
BROKEN = {
    "raise OSError('libcarrier.so: cannot open shared object file')": "OSError: libcarrier.so: cannot open",
    "class Backend(": "SyntaxError",
    "class Backend: pass": "AttributeError: .* has no attribute 'capabilities'",
    "class Backend: capabilities = property(lambda self: None)": "TypeError: capabilities is <property",
}


LACKING = """
from sage_kv_connector.backends.base import Capabilities

class Backend:
    capabilities = Capabilities("carrier", rank=1, crosses_nodes=True)
    lacks = staticmethod(lambda: "it has no card")
"""
UNSUITED = """
from sage_kv_connector.backends.base import Capabilities

class Backend:
    capabilities = Capabilities("carrier", rank=1, crosses_nodes=True)
    unsuited = staticmethod(lambda: "tcp is faster")

    @staticmethod
    def lacks():
        raise RuntimeError("loaded for nothing")
"""


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
    ours = [name for name in backends.BACKENDS if not backends.lacks(name)]
    assert sorted(backends.ranked_backends()) == sorted(ours)
    assert "backend 'carrier': the entry point 'a_broken_carrier:Backend' of" in caplog.text
    with pytest.raises(ValueError, match=f"a_broken_carrier:Backend' of .* can't be loaded: {says}"):
        backends.backend_class("carrier")


def test_auto_leaves_out_what_does_not_suit_and_asks_it_nothing_more(ship: Callable[[str], None]) -> None:
    ship(UNSUITED)
    assert "carrier" not in backends.auto_backends()
    assert backends.unsuited("carrier") == "tcp is faster" and backends.unsuited("tcp") == ""
    with pytest.raises(RuntimeError, match="loaded for nothing"):
        backends.lacks("carrier")


def test_what_this_machine_can_t_have_is_left_out_and_says_why_when_it_is_asked_for(
    ship: Callable[[str], None],
) -> None:
    ship(LACKING)
    assert "carrier" in backends.backend_names() and "carrier" not in backends.ranked_backends()
    assert backends.lacks("carrier") == "it has no card" and backends.lacks("tcp") == ""
    assert "carrier" not in enabled_backends(KVTransportConfig.load({}))
    why = r"backend is 'carrier', which can't be used here: it has no card; allowed: auto, .*tcp"
    with pytest.raises(ValueError, match=why):
        enabled_backends(KVTransportConfig.load({"backend": "carrier"}))
    (finding,) = [one for one in examine() if one.name == "backend carrier"]
    assert finding == Finding("backend carrier", "missing", "it has no card")


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
