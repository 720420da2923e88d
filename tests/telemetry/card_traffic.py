# SPDX-License-Identifier: Apache-2.0
"""Real engines of this process that hand KV over, for tests and pictures of the card: over tcp and over shm, as it is
and converted, well and not."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sage_kv_connector.contract.prompt import Prompt
from sage_kv_connector.engine.transfer.offer import OfferTerms
from sage_kv_connector.telemetry.reading.sources import Found
from tests.engine.conftest import made_cores
from tests.engine.converting_side import ConvertingSide, Shape
from tests.engine.paged_side import Side

PAGES = 96
PROMPT = Prompt(list(range(600)))


class Traffic:
    """Pairs of a prefill and a decode engine."""

    def __init__(self, make: Any, hostile: str = "") -> None:
        def named(name: str, **fixed: Any) -> Any:
            return lambda options=None, **kwargs: make({**fixed, **(options or {})}, engine_id=name, **kwargs)

        tcp, shm = {"backend": "tcp"}, {"backend": "shm"}
        self.plain = [
            ConvertingSide(named(hostile or "prefill-0", **tcp), Shape(), PAGES),
            ConvertingSide(named("decode-0", **tcp), Shape(), PAGES),
        ]
        self.converting = [
            ConvertingSide(named("prefill-1", **shm), Shape(), PAGES, target_dtype="fp8_e4m3"),
            ConvertingSide(named("decode-1", **shm), Shape(order="nhd"), PAGES, target_dtype="fp8_e4m3"),
        ]
        self.prompted = [
            Side(make(tcp, engine_id="prefill-2"), 1),
            Side(make(tcp, engine_id="decode-2"), 2),
        ]
        self._numbers = itertools.count()
        self._lock = threading.Lock()  # tests ask for a failure while another thread moves

    def source(self) -> Found:
        sides: list[ConvertingSide | Side] = [*self.plain, *self.converting, *self.prompted]
        return Found([side.core.snapshot() for side in sides])

    def move(self, pages: int = 32) -> None:
        """One hand-over of each pair. Any thread."""
        with self._lock:
            self._move(pages)

    def _move(self, pages: int) -> None:
        for prefill, decode in (self.plain, self.converting):
            name = f"req-{next(self._numbers):04}"
            offer = prefill.offer(name, range(pages))
            decode.subscribe(prefill, name, range(pages * prefill.shape.page_size), range(pages))
            for layer in range(len(prefill.cache)):
                prefill.ready(name, offer, slice(layer, layer + 1), pages)
            prefill.core.finish(name)
            assert decode.outcomes.get(timeout=10).ok and prefill.released.get(timeout=10).ok
        name = f"req-{next(self._numbers):04}"
        first, second = self.prompted
        first.prefilled(name, [1, 2, 3], OfferTerms(prompt=PROMPT))
        second.subscribe(first, name, range(3), [4, 5, 6])
        assert second.outcomes.get(timeout=10).ok and first.released.get(timeout=10).ok

    def fail(self) -> None:
        """A transfer that prefill does not have. Any thread."""
        prefill, decode = self.plain
        with self._lock:
            decode.subscribe(prefill, "nobody-has-it", range(16), [0], finished=True)
            assert not decode.outcomes.get(timeout=10).ok


@contextmanager
def traffic(hostile: str = "") -> Iterator[Traffic]:
    """``hostile``: what one of the engines calls itself."""
    making = made_cores(host="127.0.0.1")
    make = next(making)
    try:
        yield Traffic(make, hostile)
    finally:
        for _ in making:
            pass
