# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from functools import partial

from sage_kv_connector.backends.rdma.backend import RdmaBackend
from tests.backends.kinds import Kind, forge_native
from tests.backends.tcp.kinds import stranger

BOUNDS = (("lanes", 0), ("chunk_bytes", 100), ("spin_us", 10**9))

_kind = partial(
    Kind,
    make=RdmaBackend,
    listen_on="rdma://127.0.0.1:0",
    crosses_wire=True,
    stranger=stranger,
    kernel_answers=True,
    forge=forge_native,
)
#: One socket and one path; a protected connection has no path.
KINDS = (
    _kind("rdma", lanes=2, mode="rdma", bounds=BOUNDS),
    _kind("rdma-encrypted", mode="stream", encrypts=True),
)
