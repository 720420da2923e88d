# SPDX-License-Identifier: Apache-2.0
"""Pictures of the card for docs, over real engines of this process: make shell ARGS="python -m scripts.card_pictures"

Needs what make test-card needs, and a font with Chinese (Debian/Ubuntu: fonts-noto-cjk).
"""

from __future__ import annotations

import io
import itertools
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

from PIL import Image

from integration_tests.card_browser import browser, serving
from sage_kv_connector.integrations.sage.gateway import create_app as gateway
from sage_kv_connector.telemetry.reading.exporter import create_app as exporter
from sage_kv_connector.telemetry.recording.publishing import DIRECTORY_ENV
from tests.telemetry.card_traffic import traffic

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "images"
SIZE = {"width": 1240, "height": 860}
#: A minute of traffic fills the charts.
SECONDS = 60


def take(chrome: Any, wanted: dict[str, tuple[str, str, str]]) -> None:
    """All at once, so that their charts show the same time."""
    pages = {}
    for name, (url, language, theme) in wanted.items():
        context = chrome.new_context(locale=language, color_scheme=theme, viewport=SIZE)
        pages[name] = context.new_page()
        pages[name].goto(url)
    next(iter(pages.values())).wait_for_timeout(SECONDS * 1000)
    for name, page in pages.items():
        path = PICTURES / f"{name}.png"
        # Few colours are enough, and a third of the bytes.
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
        print(path.name, path.stat().st_size)


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        os.environ[DIRECTORY_ENV] = f"{place}/telemetry"
        stop = threading.Event()
        with traffic() as engines:
            engines.move()
            engines.fail()

            def go() -> None:
                for pages in itertools.cycle((8, 16, 32, 96, 64, 32)):
                    for _ in range(20):
                        if stop.wait(0.1):
                            return
                        engines.move(pages)

            thread = threading.Thread(target=go)
            thread.start()
            try:
                with (
                    serving(exporter(engines.source)) as one,
                    serving(gateway()) as other,
                    browser() as chrome,
                ):
                    take(
                        chrome,
                        {
                            "card-en-light": (f"{one}/kv-transport/", "en-GB", "light"),
                            "card-zh-dark": (f"{one}/kv-transport/", "zh-CN", "dark"),
                            "card-gateway-en-dark": (f"{other}/kv-transport/", "en-GB", "dark"),
                            "card-gateway-zh-light": (f"{other}/kv-transport/", "zh-CN", "light"),
                        },
                    )
            finally:
                stop.set()
                thread.join()


if __name__ == "__main__":
    main()
