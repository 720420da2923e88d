# SPDX-License-Identifier: Apache-2.0
"""How a transfer ended, as one log line on each side: request and transfer, whatever happened.

Nobody else logs the failure of a request's transfer; what was lost with it (a session, a device) has its own line.
"""

from __future__ import annotations

import logging
from enum import StrEnum

from sage_kv_connector.contract.failure import printable
from sage_kv_connector.contract.plan import Outcome, TransferStats
from sage_kv_connector.telemetry.recording.flood import Flood, more_text
from sage_kv_connector.telemetry.recording.json_lines import facts


class Side(StrEnum):
    """Who tells it."""

    PREFILL = "prefill"
    DECODE = "decode"


class OutcomeLog:
    """Of one side of a worker. Any thread.

    A failure is a warning: a prompt is computed twice. Of a flood of equal codes one a second is; the others, and
    whatever went as somebody wanted it, are lines for debugging.
    """

    def __init__(self, logger: logging.Logger, side: Side, flood: Flood | None = None) -> None:
        self._logger = logger
        self._side = side
        self._flood = flood or Flood()

    def write(self, request: str, outcome: Outcome) -> None:
        """``request``: what the engine calls it."""
        failure, stats = outcome.failure, outcome.stats
        level, untold = logging.DEBUG, 0
        if failure is not None and not outcome.aborted:
            found = self._flood.untold(failure.code)
            if found is not None:
                level, untold = logging.WARNING, found
        if not self._logger.isEnabledFor(level):
            return
        of = facts(
            _event(outcome),
            transfer=outcome.transfer_id,
            request=request,
            side=str(self._side),
            peer=stats.peer if stats else failure.peer if failure else "",
            backend=stats.backend if stats else "",
            code=str(failure.code) if failure else "ok",
            stage=str(failure.stage) if failure else "",
            bytes=stats.nbytes if stats else failure.nbytes if failure else 0,
            seconds=sum(seconds for _, seconds in outcome.stages),
            stages=dict(outcome.stages),
            untold=untold,
        )
        self._logger.log(level, "%s%s", self._text(request, outcome), more_text(untold), extra=of)

    def _text(self, request: str, outcome: Outcome) -> str:
        named = f"request {printable(request)}, transfer {printable(outcome.transfer_id)}"
        failure, decode = outcome.failure, self._side is Side.DECODE
        if outcome.stats is not None:
            return f"{'received' if decode else 'sent'} KV of {named}: {_moved(outcome.stats)}"
        if failure is None:
            return f"KV of {named}: not needed"
        why = f"{printable(failure.detail)} ({failure.facts})"
        if outcome.aborted:
            return f"KV of {named}: given up: {why}"
        what = "did not arrive" if decode else "was not fetched"
        return f"KV of {named}: {what}: {why}; `sage-kvt explain {failure.code}` says more"


def _event(outcome: Outcome) -> str:
    if outcome.ok:
        return "transfer"
    return "unneeded" if outcome.unneeded else "aborted" if outcome.aborted else "failure"


def _moved(stats: TransferStats) -> str:
    """Bytes, time, rate and way."""
    guarded = stats.security if stats.security != "none" else "crc32c" if stats.checksum else ""
    return (
        f"{stats.nbytes} bytes in {stats.transfer_s * 1e3:.1f} ms ({stats.gbytes_per_s:.2f} GB/s) "
        f"over {stats.backend} ({stats.mode}{guarded and f', {guarded}'}"
        f"{'' if stats.wire_dtype == 'same' else f', {stats.wire_dtype} on the wire'})"
    )
