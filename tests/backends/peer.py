# SPDX-License-Identifier: Apache-2.0
"""A sending process that tests kill, stop or confuse: ``python -m tests.backends.peer KIND BYTES``.

Prints its address; posts BYTES into each window whose descriptor it is sent.
"""

from __future__ import annotations

import sys

from sage_kv_connector.backends.base import EventKind
from tests.backends.pair import KINDS, from_start, listen, memory


def main() -> None:
    kind, size = sys.argv[1], int(sys.argv[2])
    backend = KINDS[kind]()
    data = memory(backend, size, seed=1)
    print(listen(backend), flush=True)
    while True:
        backend.wait(1.0)
        for event in backend.poll():
            if event.kind == EventKind.ACCEPTED:
                backend.authorize(event.connection)
            elif event.kind == EventKind.MESSAGE:
                backend.post(event.connection, event.payload, from_start(data), 1)


if __name__ == "__main__":
    main()
