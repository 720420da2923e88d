# SPDX-License-Identifier: Apache-2.0
"""How a transfer ended, as one log line: request and transfer on both sides, whatever happened."""

from __future__ import annotations

import logging
from enum import Enum

from sage_kv_connector.contract.failure import printable
from sage_kv_connector.contract.plan import Outcome, TransferStats


class Side(Enum):
    """Who tells it, by what happened to the KV there."""

    PREFILL = "sent"
    DECODE = "received"


def log_outcome(logger: logging.Logger, side: Side, request: str, outcome: Outcome) -> None:
    """One line: informative if all went well or was wanted so, a warning if a prompt is computed twice."""
    named = f"request {printable(request)}, transfer {printable(outcome.transfer_id)}"
    failure = outcome.failure
    if outcome.stats is not None:
        logger.info("%s KV of %s: %s", side.value, named, _moved(outcome.stats))
    elif failure is None:
        logger.info("KV of %s: not needed", named)
    elif outcome.aborted:
        logger.info("KV of %s: given up: %s (%s)", named, failure.detail, failure.facts)
    else:
        what = "did not arrive" if side is Side.DECODE else "was not fetched"
        logger.warning(
            "KV of %s: %s: %s (%s); `sage-kvt explain %s` says more",
            named,
            what,
            failure.detail,
            failure.facts,
            failure.code,
        )


def _moved(stats: TransferStats) -> str:
    """Bytes, time, rate and way."""
    return (
        f"{stats.nbytes} bytes in {stats.transfer_s * 1e3:.1f} ms ({stats.gbytes_per_s:.2f} GB/s) "
        f"over {stats.backend} ({stats.mode}{', crc32c' if stats.checksum else ''}"
        f"{'' if stats.wire_dtype == 'same' else f', {stats.wire_dtype} on the wire'})"
    )
