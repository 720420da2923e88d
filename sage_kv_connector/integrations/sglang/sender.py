# SPDX-License-Identifier: Apache-2.0
"""One request on prefill.

``KVPoll``: Bootstrapping → WaitingForInput at once, since pages are offered and prefill need not
wait for decode → Transferring from the first chunk → Success when pages and metadata were fetched,
or Failed: aborted, given up by decode, or not fetched within the lease.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import CommonKVSender


class SageKVSender(CommonKVSender):  # type: ignore[misc]
    """Methods are called on SGLang's scheduler thread."""

    #: Pages come as arrays, without CUDA events.
    supports_host_tensor_indices = False

    def __init__(
        self,
        mgr: Any,
        bootstrap_addr: str,
        bootstrap_room: int,
        req_has_disagg_prefill_dp_rank: bool = False,
        **more: Any,
    ) -> None:
        super().__init__(mgr, bootstrap_addr, bootstrap_room, req_has_disagg_prefill_dp_rank, **more)
        if mgr.request_status.get(bootstrap_room) == KVPoll.Bootstrapping:
            mgr.open_room(bootstrap_room)
            mgr.update_status(bootstrap_room, KVPoll.WaitingForInput)

    def pop_decode_prefix_len(self) -> int:
        """Everything is offered; decode asks only for what its own cache lacks."""
        return 0

    def get_max_transfer_tokens(self) -> int | None:
        return None

    def get_transfer_metric(self) -> Any:
        moved = self.kv_mgr.delivered(self.bootstrap_room)
        self._transfer_metric.transfer_total_bytes = moved.nbytes
        self._transfer_metric.transfer_latency_s = moved.transfer_s
        return self._transfer_metric

    def abort(self) -> None:
        super().abort()
        self.kv_mgr.close_room(self.bootstrap_room, "prefill was aborted")

    def clear(self) -> None:
        self.kv_mgr.close_room(self.bootstrap_room, "prefill gave the request up")
        super().clear()
