# SPDX-License-Identifier: Apache-2.0
"""A rank of an SGLang server whose pool lies on an emulated device, or in host memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from sage_kv_connector.contract.bootstrap_room import MetadataKind
from sage_kv_connector.contract.node import node_id
from sage_kv_connector.hardware.report.descriptors import descriptors
from sage_kv_connector.integrations.common import accelerator
from sage_kv_connector.integrations.common.accelerator import NamedDevice
from sage_kv_connector.integrations.common.prefill_ranks import PrefillEngine, PrefillRank
from sage_kv_connector.vendors import VENDORS
from tests.engine.paged_side import eventually
from tests.engine.watched_runtime import EnginesEvent, Event, Watched
from tests.sglang.stand_in import DisaggregationMode, KVPoll, Surroundings
from tests.vendors.rig import H2D, Rig

PREFILL, DECODE = DisaggregationMode.PREFILL, DisaggregationMode.DECODE
LAYERS, PAGES, HEADS, ROWS = 3, 12, 2, 4
ROOM, ROW, THEIR_ROW = 7, 1, 2
THERE, HERE = [3, 9, 4, 7], [6, 2, 8, 1]
#: So that kernels have room for their buffers.
MEMORY = 160 << 20
#: No outcome comes while a device stands still; how long a test looks.
STANDS_S = 0.2
ADDRESS = "prefill:8998"
#: What torch calls a vendor's cards.
TORCH = {vendor: next(iter(descriptors(vendor).torch_devices)) for vendor in VENDORS}


class Layout(NamedTuple):
    """``planes`` of each layer with ``dim`` channels: K and V of all heads, or one latent.

    ``in_parts``: a latent in two buffers. ``window``: tokens that some layers keep, of ``window_heads``, in a pool of
    their own; 0 where all keep everything.
    """

    planes: int = 2
    dim: int = 32
    page_size: int = 16
    window: int = 0
    window_heads: int = 2
    in_parts: bool = False

    @property
    def latent(self) -> bool:
        return self.planes == 1 or self.in_parts


KV = Layout()
LATENT = Layout(planes=1, dim=96)
IN_PARTS = Layout(dim=48, in_parts=True)
#: Numbers in a model with windows; the others are ``LAYERS``. Their pool has more pages than the other one.
WINDOWED, OTHERS, WINDOW_PAGES = [0, 3], [1, 2, 4], PAGES + 3


class Tensor(NamedTuple):
    """Bytes somewhere, with what SGLang's metadata buffers tell of theirs."""

    address: int
    nbytes: int
    row_bytes: int
    device: Any

    def data_ptr(self) -> int:
        return self.address


class Server:
    """``rig``: of the device that the pool lies on, None for host memory; ``metadata_on_device`` as on Ascend.

    ``pool``, ``windows`` and ``metadata`` are copies on the host: by buffer, uint8 of shape (pages or rows, bytes).
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        surroundings: Surroundings,
        mode: DisaggregationMode,
        rig: Rig | None,
        layout: Layout = KV,
        *,
        metadata_on_device: bool = False,
        metadata_device: Any = None,
        **kv_args: Any,
    ) -> None:
        from sage_kv_connector.integrations.sglang.manager import SageKVManager
        from sage_kv_connector.integrations.sglang.metadata_rows import follow_metadata_buffers

        self.rig, self.layout = rig, layout
        heads = 1 if layout.latent else HEADS
        page_bytes = layout.page_size * heads * layout.dim * 2
        seed = np.random.default_rng(list(mode.value.encode()))
        shapes = [(PAGES, page_bytes)] * (layout.planes * LAYERS)
        self.pool = [self._finite(seed, shape) for shape in shapes]
        self.metadata = [seed.integers(0, 256, (ROWS, n), dtype=np.uint8) for n in (64, 64, 512, 96, 64)]
        self._pool = [self._place(one, rig) for one in self.pool]
        window_bytes = layout.page_size * layout.window_heads * layout.dim * 2
        count = 2 * len(WINDOWED) if layout.window else 0
        self.windows = [self._finite(seed, (WINDOW_PAGES, window_bytes)) for _ in range(count)]
        self._windows = [self._place(one, rig) for one in self.windows]
        rows_on = rig if metadata_on_device else None
        buffers = [self._place(one, rows_on) for one in self.metadata]
        lies_on = metadata_device or NamedDevice(
            "cpu" if rows_on is None else TORCH[rows_on.runtime.vendor], 0
        )
        self._metadata = [
            Tensor(at, copy.nbytes, copy.shape[1], lies_on)
            for at, copy in zip(buffers, self.metadata, strict=True)
        ]
        follow_metadata_buffers()
        made = sys.modules["sglang.srt.disaggregation.utils"].MetadataBuffers(self._metadata)
        addresses, lengths, items = made.get_buf_infos()
        known: dict[str, Any] = dict(
            kv_data_ptrs=self._pool,
            kv_data_lens=[one.nbytes for one in self.pool],
            kv_item_lens=[page_bytes for _ in self.pool],
            kv_layer_ids=[],
            kv_cache_dtype_str="auto",
            kv_layout=None,
            state_types=["swa"] if layout.window else [],
            state_data_ptrs=[self._windows],
            state_data_lens=[[one.nbytes for one in self.windows]],
            state_item_lens=[[window_bytes] * count],
            swa_kv_cache_layout="nhd" if layout.window else None,
            num_draft_entries=0,
            kv_buf_groups=2 if layout.in_parts else 1,
            page_size=layout.page_size,
            aux_data_ptrs=addresses,
            aux_data_lens=lengths,
            aux_item_lens=items,
            gpu_id=0,
            pp_rank=0,
        )
        args = SimpleNamespace(**(known | kv_args))
        model = surroundings.model
        model.num_hidden_layers, model.heads, model.window_heads = LAYERS, HEADS, layout.window_heads
        if layout.window:
            model.num_hidden_layers, model.sliding_window_size = len(WINDOWED + OTHERS), layout.window
            model.swa_attention_layer_ids, model.full_attention_layer_ids = WINDOWED, OTHERS
        surroundings.device.device = "cpu" if rig is None else TORCH[rig.runtime.vendor]
        if rig is not None:
            watched = self.watched = Watched(rig.runtime)
            self.stream = rig.runtime.stream_create(0)
            opened: Any = watched
            monkeypatch.setattr(accelerator, "_torch_build", lambda: None)
            monkeypatch.setattr(accelerator, "_TorchEvent", lambda _: Event(watched, self.stream))
            monkeypatch.setattr(accelerator, "open_runtime", lambda _: opened)
        self.manager: Any = SageKVManager(args, mode, SimpleNamespace(model_path="m"), layout.latent)
        if rig is not None:
            self.watched.begin()

    @staticmethod
    def _finite(seed: np.random.Generator, shape: tuple[int, int]) -> npt.NDArray[np.uint8]:
        """Elements of bf16 near 1, so that they are numbers in every format."""
        values = seed.normal(size=(shape[0], shape[1] // 2)).astype(np.float32)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)

    def _place(self, content: npt.NDArray[np.uint8], rig: Rig | None) -> int:
        if rig is None:
            return int(content.ctypes.data)
        pinned = rig.pinned(content.nbytes)
        pinned[:] = content.reshape(-1)
        return rig.upload(pinned)

    def address(self, metadata: MetadataKind) -> PrefillEngine:
        core = self.manager.core
        rank = PrefillRank(core.engine_id, core.rank, core.addresses, node_id())
        return PrefillEngine((rank,), metadata=metadata)

    # -- SGLang on prefill

    def launch(self, pages: list[int], windows: Sequence[int] = ()) -> None:
        """A forward pass: these pages get other content, on SGLang's own stream."""
        for copies, places, ids in (
            (self.pool, self._pool, list(pages)),
            (self.windows, self._windows, list(windows)),
        ):
            for copy, begin in zip(copies, places, strict=True):
                copy[ids] = np.roll(copy[ids], 2, axis=1)
                for page in ids:
                    self._launch_copy(begin + page * copy.shape[1], copy[page])

    def launch_row(self, row: int) -> None:
        """The metadata of a request that was prefilled, where the device keeps it."""
        for copy, tensor in zip(self.metadata, self._metadata, strict=True):
            copy[row] = copy[row][::-1]
            self._launch_copy(tensor.address + row * copy.shape[1], copy[row])

    def _launch_copy(self, to: int, content: npt.NDArray[np.uint8]) -> None:
        assert self.rig is not None
        pinned = self.rig.pinned(content.nbytes)
        pinned[:] = content
        self.rig.runtime.copy_async(0, to, pinned.ctypes.data, len(pinned), H2D, self.stream)

    def event(self) -> EnginesEvent:
        return EnginesEvent(self.watched, self.stream)

    def sender(self, room: int, pages: int, row: int) -> Any:
        from sage_kv_connector.integrations.sglang.prefill import SageKVSender

        sender = SageKVSender(self.manager, ADDRESS, room)
        sender.init(pages, row)
        return sender

    # -- SGLang on decode

    def receiver(
        self,
        prefill: Server,
        room: int,
        pages: list[int],
        row: int,
        metadata: MetadataKind = MetadataKind.SGLANG_ROW,
        windows: list[int] | None = None,
        window_begin: int | None = None,
        prefix: int = 0,
    ) -> Any:
        """Asks for all pages of a room, and for what prefill's engine offers beside them.

        ``window_begin``: the token, as SGLang tells it; ``prefix``: tokens that decode has.
        """
        from sage_kv_connector.integrations.sglang.decode import SageKVReceiver

        self.manager.servers = SimpleNamespace(
            find=lambda *_: prefill.address(metadata), forget=lambda _: None
        )
        receiver = SageKVReceiver(self.manager, ADDRESS, room)
        receiver.init(0)
        receiver.window_begin = window_begin
        states = None if windows is None else [array(windows)]
        receiver.send_metadata(array(pages), row, states, decode_prefix_len=prefix)
        return receiver

    def read(self) -> None:
        """What lies on the device now, into the copies."""
        rows = [tensor.address for tensor in self._metadata]
        held = (self.pool, self._pool), (self.windows, self._windows), (self.metadata, rows)
        for copies, places in held:
            for copy, begin in zip(copies, places, strict=True):
                if copy.ctypes.data != begin:
                    assert self.rig is not None
                    copy[:] = self.rig.download(begin, copy.nbytes).reshape(copy.shape)

    def tokens(self, pages: list[int]) -> list[npt.NDArray[np.uint8]]:
        """Of each buffer, in the order of tokens, however many a page holds."""
        return [copy[pages].reshape(len(pages) * self.layout.page_size, -1) for copy in self.pool]

    def row(self, row: int) -> list[bytes]:
        return [copy[row].tobytes() for copy in self.metadata]

    def close(self) -> None:
        if self.manager.computed is not None:
            self.manager.computed.close()
        self.manager.metadata.close()
        self.manager.core.close()


#: Makes servers that end with the test.
Serve = Callable[..., Server]


def status(end: Any) -> int:
    return int(end.poll())


def landed(receiver: Any, decode: Server) -> None:
    eventually(lambda: status(receiver) in (KVPoll.Success, KVPoll.Failed))
    assert status(receiver) == KVPoll.Success, decode.manager.failure_records


def failed(end: Any, server: Server, why: str) -> None:
    eventually(lambda: status(end) == KVPoll.Failed)
    eventually(lambda: why in server.manager.failure_records.get(end.bootstrap_room, ""))


def compare(prefill: Server, decode: Server, there: list[int] = THERE, here: list[int] = HERE) -> None:
    decode.read()
    for sent, got in zip(prefill.tokens(there), decode.tokens(here), strict=True):
        assert np.array_equal(sent, got)
    assert decode.row(THEIR_ROW) == prefill.row(ROW)


def array(pages: list[int]) -> Any:
    return np.array(pages, dtype=np.int32)
