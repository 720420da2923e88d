# SPDX-License-Identifier: Apache-2.0
"""What a check found."""

from __future__ import annotations

from typing import NamedTuple


class Finding(NamedTuple):
    """One check. ``state``: "ok", "missing" (not needed by everyone) or "broken"."""

    name: str
    state: str
    detail: str
