# SPDX-License-Identifier: Apache-2.0
"""Which prefill ranks a decode rank reads from; bootstrap servers are asked on threads of its own, once each."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from sage_kv_connector.contract.failure import Code, Reason, printable
from sage_kv_connector.integrations.common.bootstrap_answers import query_bootstrap, query_engine
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
        self._resolver = ThreadPoolExecutor(2, thread_name_prefix="sage-kvt-bootstrap-query")

    def close(self) -> None:
        self._resolver.shutdown(wait=False, cancel_futures=True)

    def peers(self, prefill: PrefillEngine) -> list[ReadPeer] | Reason:
        """The ranks to read from; those that nobody reads are rank 0's, with no consumers."""
        try:
            return read_peers(self._decode, prefill, self._enabled)
        except ValueError as error:
            return Reason(Code.PARALLEL_SIZES, str(error))

    def resolve(self, remote: RemotePrefill, use: UsePeers) -> None:
        """Call ``use`` now, or on a thread of the pool if a bootstrap server must be asked."""
        known = remote.prefill or self._known.get(remote.place)
        if known is not None:  # a router may still name the engine that was there before a restart
            use(self.peers(known))
            return

        def ask() -> None:
            try:
                answer = _ask(remote, self._connect_timeout_s)
            except Exception as error:  # whatever a client may have named, its request must end
                why = f"bootstrap server {printable(remote.bootstrap)}: {error or type(error).__name__}"
                use(Reason(Code.BOOTSTRAP, why))
                return
            self._remember(remote.place, answer)
            use(self.peers(answer))

        self._resolver.submit(ask)

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
