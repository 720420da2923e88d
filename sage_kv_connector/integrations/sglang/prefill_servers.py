# SPDX-License-Identifier: Apache-2.0
"""Where prefill servers are, asked for by threads: SGLang's scheduler asks in its loop, up to 5 s a server.

A client may name any host. One that is silent must not hold up the requests of others, and what one answers must not
end the scheduler.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from sage_kv_connector.contract.failure import Code, Reason
from sage_kv_connector.integrations.common.bootstrap_answers import query_engines
from sage_kv_connector.integrations.common.bootstrap_queries import BootstrapQueries
from sage_kv_connector.integrations.common.prefill_ranks import PrefillEngine

#: What the scheduler waits for an answer before it goes on; it comes back a second later.
NEW_S = 0.05
#: The same, where a server was known and its requests would fail otherwise.
KNOWN_S = 0.5
#: SGLang's own limit for its question.
ROUTE_S = 5.0
MAX_SERVERS = 1024

#: The engines of a server by data parallel rank, or why they are not known.
Engines = dict[int, PrefillEngine] | Reason


class PrefillServers:
    """``route``: SGLang's question to a server by address; says whether it was answered, or raises."""

    def __init__(self, route: Callable[[str], bool], connect_timeout_s: float) -> None:
        self._route = route
        self._connect_timeout_s = connect_timeout_s
        self._queries: BootstrapQueries[None] = BootstrapQueries(ROUTE_S + connect_timeout_s)
        self._known: dict[str, Engines] = {}

    def ask(self, address: str, patience_s: float = NEW_S) -> None:
        """Begin to find out; wait a moment for the answer, if no other server is being asked."""
        told = threading.Event()
        alone = not len(self._queries)
        self._queries.ask(address, partial(self._query, address), lambda _: told.set())
        if alone:
            told.wait(patience_s)

    def find(self, address: str, dp_rank: int) -> PrefillEngine | Reason:
        """What is known; asked for again if it was forgotten."""
        if address not in self._known:
            self.ask(address, KNOWN_S)
        engines = self._known.get(address, Reason(Code.BOOTSTRAP, "it has not answered yet"))
        if isinstance(engines, Reason):
            return engines
        if dp_rank not in engines:
            known = ", ".join(map(str, sorted(engines))) or "none"
            return Reason(Code.BOOTSTRAP, f"data parallel rank {dp_rank} is not among {known}")
        return engines[dp_rank]

    def forget(self, address: str) -> None:
        """Any thread: a transfer from there failed, and it may have been restarted."""
        self._known.pop(address, None)

    def _query(self, address: str) -> None:
        try:
            found: Engines = query_engines(f"http://{address}", self._connect_timeout_s)
        except (OSError, ValueError) as error:
            found = Reason(Code.BOOTSTRAP, f"{error} (sage_kvt must be the transfer backend on both sides)")
        if len(self._known) >= MAX_SERVERS:
            self._known.pop(next(iter(self._known)), None)
        self._known[address] = found  # before SGLang makes receivers
        try:
            if not self._route(address):
                raise OSError("it does not tell its parallel sizes")
        except Exception:
            self.forget(address)
            raise
