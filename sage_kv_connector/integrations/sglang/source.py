# SPDX-License-Identifier: Apache-2.0
"""One request's pages on prefill, which grow with each chunk that SGLang sends."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sage_kv_connector.contract.cache_view import KVCacheView
from sage_kv_connector.engine.messages import SubscribePart
from sage_kv_connector.engine.source import PagedSource, PartReader

#: SGLang keeps page 0 for padding: its memory is there, its content is nobody's.
PADDING_PAGE = 0


class GrowingSource(PagedSource):
    """``append`` adds the pages of a chunk, final by then; ``complete`` says that there are no more."""

    def __init__(self, view: KVCacheView) -> None:
        super().__init__(view)
        self._complete = False
        self._asked = 0  # pages

    def append(self, page_ids: npt.NDArray[np.int64]) -> None:
        self.set_pages(0, np.concatenate([self.pages[0], page_ids]))
        self.advance(0, slice(None), len(self.pages[0]))

    def complete(self) -> None:
        self._complete = True
        self._pad()

    def part(self, request: SubscribePart) -> PartReader:
        size = self._view.groups[0].page_size
        self._asked = max(self._asked, -(-(request.first_token + request.tokens) // size))
        if self._complete:
            self._pad()
        return super().part(request)

    def _pad(self) -> None:
        """Decode asks for whole pages of its own: what it asks for behind the prompt's end is padding."""
        missing = self._asked - len(self.pages[0])
        if missing > 0:
            self.append(np.full(missing, PADDING_PAGE, dtype=np.int64))
