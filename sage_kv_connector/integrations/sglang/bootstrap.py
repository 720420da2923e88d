# SPDX-License-Identifier: Apache-2.0
"""SGLang's bootstrap server, which also tells where each prefill rank's transport listens.

Page size and cache dtype are left out of its answers: SGLang refuses decode servers that differ in
them, while here the engine compares both sides' schemas and converts.
"""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web
from sglang.srt.disaggregation.common.conn import CommonKVBootstrapServer

#: The field of registrations and answers that is ours.
FIELD = "sage_kvt"


class SageKVBootstrapServer(CommonKVBootstrapServer):  # type: ignore[misc]
    """Keeps the ranks' transport addresses beside SGLang's own registrations."""

    def __init__(self, host: str, port: int) -> None:
        self._ranks: dict[tuple[int, int, int], Any] = {}  # (dp, tp, pp) rank → registration
        super().__init__(host, port)

    async def _handle_route_put(self, request: web.Request) -> web.Response:
        response: web.Response = await super()._handle_route_put(request)
        if response.status == 200:
            data = await request.json()
            dp_rank = data["attn_dp_rank"] if data["system_dp_size"] == 1 else data["system_dp_rank"]
            self._ranks[int(dp_rank), int(data["attn_tp_rank"]), int(data["pp_rank"])] = data.get(FIELD)
            self.page_size = self.kv_cache_dtype = None
        return response

    async def _handle_route_get(self, request: web.Request) -> web.Response:
        response: web.Response = await super()._handle_route_get(request)
        if response.status != 200:
            return response
        names = ("prefill_dp_rank", "target_tp_rank", "target_pp_rank")
        dp_rank, tp_rank, pp_rank = (int(request.query[name]) for name in names)
        if (dp_rank, tp_rank, pp_rank) not in self._ranks:  # the question about the whole server
            return response
        answer = json.loads(response.text or "{}")
        return web.json_response(answer | {FIELD: self._ranks[dp_rank, tp_rank, pp_rank]})
