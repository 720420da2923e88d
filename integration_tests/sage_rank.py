# SPDX-License-Identifier: Apache-2.0
"""A sending rank in a process of its own, to be killed: sends PATTERN once, says so, and sends without end.

Arguments: master port, backend.
"""

from __future__ import annotations

import sys
import uuid

from sagellm_kv_cache.transfer import KVHandle, KVTransferEngine

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.integrations.sage.comm_backend import SageKvtCommBackend

NBYTES = 32 << 20


def pattern() -> bytes:
    return bytes(range(256)) * (NBYTES // 256)


def main() -> None:
    backend = SageKvtCommBackend(KVTransportConfig.load({"backend": sys.argv[2], "deadline_s": 30}))
    backend.init(0, 2, "127.0.0.1", int(sys.argv[1]))
    engine = KVTransferEngine(backend)
    while True:
        engine.transfer_kv_handle(KVHandle(handle_id=uuid.uuid4(), num_tokens=1), 0, 1, pattern())
        print("sent", flush=True)


if __name__ == "__main__":
    main()
