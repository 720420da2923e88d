# SPDX-License-Identifier: Apache-2.0
"""Who was not let in: counted by code, and logged with the address; a flood of strangers is no flood of lines."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

from sage_kv_connector.backends.base import Event, Status
from sage_kv_connector.contract.failure import Code, Reason, printable
from sage_kv_connector.telemetry.recording.flood import Flood, more_text
from sage_kv_connector.telemetry.recording.json_lines import facts

logger = logging.getLogger(__name__)

_CODES = {Status.FORGED: Code.FORGED, Status.REFUSED: Code.BUSY, Status.IO_ERROR: Code.UNREACHABLE}


def code_of(event: Event) -> Code:
    """Of a connection that ended before its peer proved who it is."""
    return _CODES.get(Status(event.status), Code.PROTOCOL)


class Refusals:
    """Of one engine. Control thread only, but for reading ``by_code``. ``on_noted``: after each; short."""

    def __init__(self, on_noted: Callable[[], object], flood: Flood | None = None) -> None:
        self._on_noted = on_noted
        self._flood = flood or Flood()
        self.by_code: Counter[str] = Counter()

    def note(self, who: str, why: Reason, times: int = 1) -> None:
        """``who``: the address of the connection."""
        code = str(why.code)
        self.by_code[code] += times
        self._on_noted()
        untold = self._flood.untold(code, times)
        if untold is not None:
            of = facts("refused_peer", peer=who, code=code, untold=untold)
            logger.warning("refused %s: %s%s", printable(who), why, more_text(untold), extra=of)
