# SPDX-License-Identifier: Apache-2.0
"""Which prefill ranks a decode rank reads from; bootstrap servers are asked once each."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from sage_kv_connector.contract.failure import Code, Reason, printable
from sage_kv_connector.integrations.common.bootstrap_answers import query_bootstrap, query_engine
from sage_kv_connector.integrations.common.bootstrap_queries import BootstrapQueries
from sage_kv_connector.integrations.common.prefill_ranks import (
    DecodeRank,
    PrefillEngine,
    ReadPeer,
    read_peers,
)
from sage_kv_connector.integrations.vllm.remote_prefill import RemotePrefill

#: Answers that are remembered; clients name what is asked for.
MAX_KNOWN = 1024
#: Called with the peers, or why there are none.
UsePeers = Callable[[list[ReadPeer] | Reason], None]


class PrefillDirectory:
    """``decode`` is who asks, ``enabled`` the backends it has."""

    def __init__(self, decode: DecodeRank, enabled: tuple[str, ...], connect_timeout_s: float) -> None:
        self._decode = decode
        self._enabled = enabled
        self._connect_timeout_s = connect_timeout_s
        self._known: OrderedDict[tuple[str, str], PrefillEngine] = OrderedDict()
        self._changing = threading.Lock()
        self._queries: BootstrapQueries[PrefillEngine] = BootstrapQueries(connect_timeout_s)

    def close(self) -> None:
        self._queries.close()

    def peers(self, prefill: PrefillEngine) -> list[ReadPeer] | Reason:
        """The ranks to read from; those that nobody reads are rank 0's, with no consumers."""
        try:
            return read_peers(self._decode, prefill, self._enabled)
        except ValueError as error:
            return Reason(Code.PARALLEL_SIZES, str(error))

    def resolve(self, remote: RemotePrefill, use: UsePeers) -> None:
        """Call ``use`` now, or on another thread if a bootstrap server must be asked."""
        known = remote.prefill or self._known.get(remote.place)
        if known is not None:  # a router may still name the engine that was there before a restart
            use(self.peers(known))
            return

        def answered(answer: PrefillEngine | Reason) -> None:
            if isinstance(answer, Reason):
                named = f"bootstrap server {printable(remote.bootstrap)}: {answer.detail}"
                use(answer._replace(detail=named))
                return
            self._remember(remote.place, answer)
            use(self.peers(answer))

        self._queries.ask(remote.place, partial(_ask, remote, self._connect_timeout_s), answered)

    def forget(self, remote: RemotePrefill) -> bool:
        """Prefill may have been restarted since it was asked; whether there was anything to forget."""
        with self._changing:
            return self._known.pop(remote.place, None) is not None

    def _remember(self, place: tuple[str, str], answer: PrefillEngine) -> None:
        with self._changing:
            self._known[place] = answer
            self._known.move_to_end(place)
            while len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)


def _ask(remote: RemotePrefill, timeout_s: float) -> PrefillEngine:
    url, engine_id = remote.place
    return query_engine(url, timeout_s, engine_id) if engine_id else query_bootstrap(url, timeout_s)
