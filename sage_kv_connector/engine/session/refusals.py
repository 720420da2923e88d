# SPDX-License-Identifier: Apache-2.0
"""Who was not let in: counted by code, and logged with the address; a flood of strangers is no flood of lines."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable

from sage_kv_connector.backends.base import Event, Status
from sage_kv_connector.contract.failure import Code, Reason, printable

logger = logging.getLogger(__name__)

#: At most one line for each code in this time; the next one says how many there were.
QUIET_S = 1.0
_CODES = {Status.FORGED: Code.FORGED, Status.REFUSED: Code.BUSY, Status.IO_ERROR: Code.UNREACHABLE}


def code_of(event: Event) -> Code:
    """Of a connection that ended before its peer proved who it is."""
    return _CODES.get(Status(event.status), Code.PROTOCOL)


class Refusals:
    """Of one engine. Control thread only, but for reading ``by_code``."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: dict[Code, float] = {}
        self._untold: Counter[Code] = Counter()
        self.by_code: Counter[str] = Counter()

    def note(self, who: str, why: Reason, times: int = 1) -> None:
        """``who``: the address of the connection."""
        code = why.code
        self.by_code[str(code)] += times
        self._untold[code] += times
        now = self._clock()
        if code in self._told and now - self._told[code] < QUIET_S:
            return
        self._told[code] = now
        others = self._untold.pop(code) - 1
        more = f" ({others} more of this kind since the last line)" if others else ""
        logger.warning("refused %s: %s%s", printable(who), why, more)
