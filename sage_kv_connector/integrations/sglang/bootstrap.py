# SPDX-License-Identifier: Apache-2.0
"""SGLang's bootstrap server, which also answers where each prefill rank's transport listens (``/query``)."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import msgspec
from aiohttp import web
from sglang.srt.disaggregation.common.conn import CommonKVBootstrapServer

from sage_kv_connector.contract.bootstrap_room import MetadataKind
from sage_kv_connector.integrations.common.bootstrap_answers import FIELD, query_answer
from sage_kv_connector.integrations.common.prefill_ranks import PrefillEngine, PrefillRank


class SageKVBootstrapServer(CommonKVBootstrapServer):  # type: ignore[misc]
    """Keeps the ranks' transport addresses beside SGLang's own registrations."""

    def __init__(self, host: str, port: int) -> None:
        self._ranks: dict[int, dict[int, PrefillRank]] = defaultdict(dict)  # by data parallel rank
        super().__init__(host, port)

    def _setup_routes(self) -> None:
        super()._setup_routes()
        self.app.router.add_get("/query", self._handle_query)

    async def _handle_route_put(self, request: web.Request) -> web.Response:
        response: web.Response = await super()._handle_route_put(request)
        if response.status == 200:
            data: dict[str, Any] = await request.json()
            dp_rank = data["attn_dp_rank"] if data["system_dp_size"] == 1 else data["system_dp_rank"]
            if FIELD in data:
                rank = msgspec.convert(data[FIELD], PrefillRank)
                self._ranks[int(dp_rank)][rank.rank] = rank
            # SGLang refuses decode servers that differ in these; here they are converted.
            self.page_size = self.kv_cache_dtype = None
        return response

    async def _handle_query(self, _: web.Request) -> web.Response:
        if not self._is_ready():
            return web.Response(text="not all prefill ranks have registered yet", status=503)
        engines = {}
        for dp_rank, ranks in self._ranks.items():
            ordered = tuple(ranks[rank] for rank in sorted(ranks))
            engines[dp_rank] = PrefillEngine(ordered, self.pp_size, MetadataKind.SGLANG_ROW)
        return web.json_response(query_answer(engines))
