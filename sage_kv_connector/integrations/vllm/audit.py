# SPDX-License-Identifier: Apache-2.0
"""With ``audit_file``: digests of transferred pages, read back from each side's pool."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from sage_kv_connector.backends.base import Segments
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.engine.memory_digest import digest_segments


def record_transfer(
    audit_file: Path | None, rank: int, side: str, segments: Segments, outcome: Outcome
) -> None:
    """Append one JSON line for a transfer that arrived, while the file exists."""
    stats = outcome.stats
    if audit_file is None or stats is None or not audit_file.exists():
        return
    record = {
        "side": side,
        "transfer_id": outcome.transfer_id,
        "rank": rank,
        "sha256": digest_segments(segments, hashlib.sha256()),
        "nbytes": stats.nbytes,
        "transfer_s": stats.transfer_s,
        "backend": stats.backend,
        "mode": stats.mode,
        "checksum": stats.checksum,
    }
    with audit_file.open("a") as file:
        file.write(json.dumps(record) + "\n")
