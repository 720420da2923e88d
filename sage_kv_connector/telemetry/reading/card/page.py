# SPDX-License-Identifier: Apache-2.0
"""The files of the page. Charts are among them where npm built them (``scripts/build_card.py``)."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import NamedTuple

MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
    "txt": "text/plain; charset=utf-8",
}
#: The bundle with the chart library, its style, and the library's licence.
CHARTS = ("charts.js", "charts.css", "charts.LICENSE.txt")


class PageFile(NamedTuple):
    """What is served under one name."""

    content: bytes
    media_type: str


def page_files() -> dict[str, PageFile]:
    """By name. Without charts unless all of ``CHARTS`` were built. Raises FileNotFoundError if there is no page."""
    card = files("sage_kv_connector.telemetry.reading.card")
    found = _of(card / "page")
    if "index.html" not in found:
        raise FileNotFoundError("the card's page is not in this installation of sage_kv_connector")
    built = _of(card / "built")
    return {**found, **({name: built[name] for name in CHARTS} if set(CHARTS) <= set(built) else {})}


def _of(folder: Traversable) -> dict[str, PageFile]:
    if not folder.is_dir():
        return {}
    return {
        file.name: PageFile(file.read_bytes(), media_type)
        for file in folder.iterdir()
        if (media_type := MEDIA_TYPES.get(file.name.rpartition(".")[2]))
    }
