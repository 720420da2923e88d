# SPDX-License-Identifier: Apache-2.0
"""What a backend may have beside the contract: lanes that know pages, so that nobody lists their bytes.

A cursor over (layout, tables, selection) is given to the lanes once. They cut chunks of whatever is final, layer by
layer, and go on when the engine says that more is (``csrc/paged/cursor.h``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sage_kv_connector import _data_plane


class PagedBackend(Protocol):
    """What a Backend with ``pages`` has beside: its lanes find the bytes of pages themselves."""

    def open_paged_window(
        self,
        connection: int,
        layout: _data_plane.PageLayout,
        pages: Sequence[tuple[int, npt.NDArray[np.int64]]],
        generation: int,
    ) -> int:
        """As ``open_window``, over the pages (group, ids) of a cache; groups ascend."""
        ...

    def post_pages(
        self,
        connection: int,
        window_descriptor: bytes,
        cursor: _data_plane.PagedCursor,
        generation: int,
        *,
        priority: int = 0,
        checksum: bool = True,
    ) -> int:
        """As ``post``, of all that the cursor's subscription selects, each page as soon as it is final.

        The cursor is the lanes' from now on. SENT says BEYOND_END where the request ended before a selected page, and
        OUT_OF_BOUNDS where a page has no memory.
        """
        ...
