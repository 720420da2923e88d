# SPDX-License-Identifier: Apache-2.0
"""As much of SGLang 0.5.23 as one rank's manager, senders and receivers stand on, for a process without it.

What a status may become, when a chunk is the last one and what abort and clear do is as SGLang does it; its bootstrap,
sockets and parallel groups are not here.
"""

from __future__ import annotations

import enum
import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class KVPoll:
    Failed, Bootstrapping, WaitingForInput, Transferring, Success = range(5)


class DisaggregationMode(enum.Enum):
    PREFILL = "prefill"
    DECODE = "decode"


class CommonKVManager:
    defer_decode_allocation = False
    waiting_timeout = 10.0

    def __init__(self, args: Any, mode: Any, server_args: Any, is_mla_backend: bool | None = False) -> None:
        self.kv_args = args
        self.request_status: dict[int, int] = {}
        self.failure_records: dict[int, str] = {}
        self.prefill_info_table: dict[str, Any] = {}
        self.connection_lock = threading.Lock()
        self.system_dp_size = 1

    def try_ensure_parallel_info(self, bootstrap_addr: str) -> bool:
        return True

    def _start_heartbeat_checker_thread(self) -> None: ...

    def check_status(self, room: int) -> int:
        return int(self.request_status[room])

    def update_status(self, room: int, status: int) -> None:
        known = self.request_status.get(room)
        if known is None:
            if status in (KVPoll.Bootstrapping, KVPoll.WaitingForInput):
                self.request_status[room] = status
        elif KVPoll.Failed in (known, status):
            self.request_status[room] = KVPoll.Failed
        else:
            self.request_status[room] = max(known, status)

    def record_failure(self, room: int, why: str) -> None:
        self.failure_records[room] = why


class _End:
    kv_mgr: Any
    bootstrap_room: Any
    conclude_state: int | None = None

    def poll(self) -> int:
        status: int = self.kv_mgr.request_status.get(self.bootstrap_room, KVPoll.Failed)
        return status if self.conclude_state is None else self.conclude_state

    def abort(self) -> None:
        self.kv_mgr.record_failure(self.bootstrap_room, "Aborted by AbortReq.")
        self.kv_mgr.update_status(self.bootstrap_room, KVPoll.Failed)
        self.conclude_state = KVPoll.Failed


class CommonKVSender(_End):
    def __init__(self, mgr: Any, bootstrap_addr: str, bootstrap_room: int, known: bool = False) -> None:
        self.kv_mgr, self.bootstrap_room = mgr, bootstrap_room
        self._sent = 0
        self._early_send_wait_event: Any = None
        mgr.update_status(bootstrap_room, KVPoll.Bootstrapping)

    def init(self, num_kv_indices: int, aux_index: int | None = None) -> None:
        self.num_kv_indices, self.aux_index = num_kv_indices, aux_index

    def send(self, kv_indices: Any, state_indices: Any = None, indices_event: Any = None) -> None:
        begin = self._sent
        self._sent += len(kv_indices)
        is_last = self._sent == self.num_kv_indices
        wait_event, self._early_send_wait_event = self._early_send_wait_event, None
        self.kv_mgr.add_transfer_request(
            self.bootstrap_room,
            kv_indices,
            slice(begin, self._sent),
            is_last,
            aux_index=self.aux_index if is_last else None,
            state_indices=state_indices if is_last else None,
            wait_event=wait_event,
            indices_event=indices_event,
        )

    def clear(self) -> None:
        self.kv_mgr.request_status.pop(self.bootstrap_room, None)


class CommonKVReceiver(_End):
    def __init__(self, mgr: Any, bootstrap_addr: str, bootstrap_room: int) -> None:
        self.kv_mgr, self.bootstrap_addr, self.bootstrap_room = mgr, bootstrap_addr, bootstrap_room
        mgr.update_status(bootstrap_room, KVPoll.Bootstrapping)

    def init(self, prefill_dp_rank: int) -> None:
        self.prefill_dp_rank = prefill_dp_rank
        self._setup_bootstrap_infos()
        self.kv_mgr.update_status(self.bootstrap_room, KVPoll.WaitingForInput)

    def _setup_bootstrap_infos(self) -> None: ...
    def _send_abort_notification(self) -> None: ...
    def invalidate_cached_bootstrap_infos(self) -> None: ...

    def abort(self) -> None:
        super().abort()
        self._send_abort_notification()

    def clear(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.kv_mgr.request_status.pop(self.bootstrap_room, None)


class Surroundings:
    """What SGLang knows of its process; ``device`` is that of ``--device``."""

    def __init__(self) -> None:
        self.device = SimpleNamespace(device="cpu")
        self.parallel = SimpleNamespace(
            attn_tp_size=1, attn_tp_rank=0, pp_size=1, num_dp_ranks=1, load_balance_method="round_robin"
        )
        self.model = SimpleNamespace(
            num_hidden_layers=0,
            dtype="torch.bfloat16",
            heads=0,
            window_heads=0,
            swa_attention_layer_ids=None,
            full_attention_layer_ids=None,
            sliding_window_size=None,
        )

    def model_config(self) -> Any:
        return SimpleNamespace(
            **vars(self.model),
            get_total_num_kv_heads=lambda: self.model.heads,
            get_swa_num_kv_heads=lambda tp_size: self.model.window_heads // tp_size,
        )


#: Modules of ours that must not outlive the stand-in.
OURS = ("decode", "manager", "prefill")


def install(monkeypatch: pytest.MonkeyPatch) -> Surroundings:
    """Let this process have SGLang, until the test ends."""
    found = Surroundings()
    content: dict[str, dict[str, Any]] = {
        "sglang": {"__version__": "0.5.23"},
        "sglang.srt": {},
        "sglang.srt.configs": {},
        "sglang.srt.configs.model_config": {
            "ModelConfig": SimpleNamespace(from_server_args=lambda _: found.model_config())
        },
        "sglang.srt.disaggregation": {},
        "sglang.srt.disaggregation.base": {},
        "sglang.srt.disaggregation.base.conn": {"KVPoll": KVPoll},
        "sglang.srt.disaggregation.common": {},
        "sglang.srt.disaggregation.common.conn": {
            "CommonKVManager": CommonKVManager,
            "CommonKVSender": CommonKVSender,
            "CommonKVReceiver": CommonKVReceiver,
        },
        "sglang.srt.disaggregation.utils": {
            "DisaggregationMode": DisaggregationMode,
            "MetadataBuffers": type("MetadataBuffers", (MetadataBuffers,), {}),
        },
        "sglang.srt.runtime_context": {
            "get_device": lambda: found.device,
            "get_disagg": SimpleNamespace,
            "get_parallel": lambda: found.parallel,
        },
    }
    for name, names in content.items():
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    for name in OURS:
        monkeypatch.delitem(sys.modules, f"sage_kv_connector.integrations.sglang.{name}", raising=False)
    return found


class MetadataBuffers:
    """Tensors with one row a request; the first are token ids, the last rooms."""

    def __init__(self, tensors: list[Any]) -> None:
        self.output_ids, self.tensors = tensors[0], tensors

    def get_buf_infos(self) -> tuple[list[int], list[int], list[int]]:
        buffers = self.tensors
        return (
            [buffer.data_ptr() for buffer in buffers],
            [buffer.nbytes for buffer in buffers],
            [buffer.row_bytes for buffer in buffers],
        )
