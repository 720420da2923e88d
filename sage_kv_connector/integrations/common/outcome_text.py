# SPDX-License-Identifier: Apache-2.0
"""How a transfer ended, in the words of a log line."""

from __future__ import annotations

from sage_kv_connector.contract.plan import Outcome


def outcome_text(outcome: Outcome) -> str:
    """Bytes, time, rate and way of one that arrived; else its error."""
    stats = outcome.stats
    if stats is None:
        return outcome.error
    return (
        f"{stats.nbytes} bytes in {stats.transfer_s * 1e3:.1f} ms ({stats.gbytes_per_s:.2f} GB/s) "
        f"over {stats.backend} ({stats.mode}{', crc32c' if stats.checksum else ''}"
        f"{'' if stats.wire_dtype == 'same' else f', {stats.wire_dtype} on the wire'})"
    )
