# SPDX-License-Identifier: Apache-2.0
"""What a prefill engine's bootstrap server answers, the same for vLLM and for SGLang.

``GET /query`` has the form that vLLM's router asks for when it dispatches to both servers at once
(data parallel rank → engine id and worker addresses); decode of either engine reads our field
in it. ``GET /route`` is what SGLang's decode asks before it makes a receiver.
"""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Mapping
from typing import Any

import msgspec

from sage_kv_connector.contract.failure import printable
from sage_kv_connector.integrations.common.prefill_ranks import PrefillEngine

#: How vLLM ends the id of a data parallel rank's engine.
DP_ENGINE = re.compile(r"_dp(\d{1,6})$")
#: The field of registrations and answers that is ours.
FIELD = "sage_kvt"
MAX_ANSWER_BYTES = 1 << 20
PIECE_BYTES = 64 << 10


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object, **__: object) -> None:
        """An error, then: who is asked answers itself."""


#: Peers of a cluster are asked directly: no proxy of the environment's, and no other host that an answer names.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)


def query_answer(engines: Mapping[int, PrefillEngine]) -> dict[str, Any]:
    """The answer to ``/query``, by data parallel rank."""
    return {
        str(dp_rank): {
            "engine_id": engine.ranks[0].engine_id,
            "worker_addr": {
                str(rank.rank): {"0": next(iter(reversed(rank.addresses)), "")} for rank in engine.ranks
            },
            FIELD: msgspec.to_builtins(engine),
        }
        for dp_rank, engine in engines.items()
    }


def topology_answer(engine: PrefillEngine) -> dict[str, Any]:
    """The answer to SGLang's question about a whole server.

    Page size and cache dtype are left open: SGLang refuses decode servers that differ in them, while
    here the engine compares both sides' schemas and converts.
    """
    return {
        "attn_tp_size": engine.tp_size,
        "attn_cp_size": 1,
        "dp_size": 1,
        "pp_size": engine.pp_size,
        "page_size": None,
        "kv_cache_dtype": None,
        "follow_bootstrap_room": True,
    }


def query_bootstrap(url: str, timeout_s: float, dp_rank: int = 0) -> PrefillEngine:
    """The engine of a data parallel rank. Raises OSError when nobody answers, ValueError as ``query_engines``."""
    engines = query_engines(url, timeout_s)
    if dp_rank not in engines:
        known = ", ".join(map(str, engines)) or "none"
        raise ValueError(f"{url}/query: data parallel rank {dp_rank} is not among {known}")
    return engines[dp_rank]


def query_engine(url: str, timeout_s: float, engine_id: str) -> PrefillEngine:
    """The engine of this id, or the one that took its place when its server was restarted.

    Raises as ``query_bootstrap``, and ValueError if none of several can be the one.
    """
    engines = query_engines(url, timeout_s)
    by_id = {engine.ranks[0].engine_id: engine for engine in engines.values()}
    if engine_id in by_id:
        return by_id[engine_id]
    if len(engines) == 1:  # a router may still name the engine that was there before
        return next(iter(engines.values()))
    named = DP_ENGINE.search(engine_id)
    if named is not None and int(named[1]) in engines:
        return engines[int(named[1])]
    raise ValueError(
        f"{url}/query: engine_id {printable(engine_id)!r} is not among {', '.join(by_id) or 'none'}"
    )


def query_engines(url: str, timeout_s: float) -> dict[int, PrefillEngine]:
    """Ask ``url``/query for all data parallel ranks. Raises OSError, and ValueError when the answer is not ours."""
    until = time.monotonic() + timeout_s
    data = bytearray()
    with _opener.open(f"{url}/query", timeout=timeout_s) as response:
        while piece := response.read1(PIECE_BYTES):
            data += piece
            if len(data) > MAX_ANSWER_BYTES:
                raise ValueError(f"{url}/query answered more than {MAX_ANSWER_BYTES} bytes")
            if time.monotonic() > until:
                raise TimeoutError(f"{url}/query: the answer took longer than {timeout_s:g} s")
    try:
        return engines_in(data)
    except ValueError as error:
        raise ValueError(f"{url}/query is not answered by a sage_kvt prefill engine: {error}") from error


def engines_in(answer: bytes | bytearray) -> dict[int, PrefillEngine]:
    """What an answer to ``/query`` says, by data parallel rank. Raises ValueError for what is none of ours."""
    engines = {}
    try:
        by_rank = msgspec.json.decode(answer, type=dict[str, dict[str, Any]])
    except (msgspec.DecodeError, RecursionError) as error:  # the latter: too deep
        raise ValueError(f"it is no JSON of ranks: {error}") from error
    for dp_rank, fields in by_rank.items():
        if FIELD not in fields:
            raise ValueError(f"it has no field {FIELD!r}")
        engines[int(dp_rank)] = msgspec.convert(fields[FIELD], PrefillEngine)
    return engines
