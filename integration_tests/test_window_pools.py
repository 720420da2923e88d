# SPDX-License-Identifier: Apache-2.0
"""SGLang's own hybrid pools, allocators and prefill code: what they name and keep, against what lands on decode.

Runs in SGLang's own environment (``make test-sglang``), without a model: pools are filled by the test.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from sage_kv_connector.config.options import KVTransportConfig
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.engine import EngineCore, GroupPages, PagedSource, PagesTarget, Wanted
from sage_kv_connector.integrations.sglang.kv_pool import PoolShape, cache_schema, cache_view
from sage_kv_connector.integrations.sglang.sliding_windows import (
    WINDOW_GROUP,
    window_layers,
    window_pages,
    window_table,
)
from sage_kv_connector.launch.sglang import ON_CPU

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None, reason="runs in SGLang's environment"
)

WINDOWED, OTHERS = [0, 1, 3, 4], [2, 5]
HEADS, DIM, WINDOW, SIZE, WINDOW_SIZE = 2, 16, 24, 256, 192
MODEL = SimpleNamespace(
    swa_attention_layer_ids=WINDOWED,
    full_attention_layer_ids=OTHERS,
    sliding_window_size=WINDOW,
    get_swa_num_kv_heads=lambda tp_size: HEADS // tp_size,
)


@pytest.fixture(scope="module", autouse=True)
def on_cpu() -> None:
    sys.path.insert(0, str(ON_CPU))
    spec = importlib.util.spec_from_file_location("sglang_on_cpu", ON_CPU / "sitecustomize.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


class Side:
    """A rank's pool and allocator, with random content, and the transport's engine over it."""

    def __init__(self, page_size: int, seed: int) -> None:
        import torch
        from sglang.srt.disaggregation.base.conn import KVArgs
        from sglang.srt.disaggregation.utils import get_kv_transfer_buf_infos, setup_state_kv_args
        from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
        from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

        self.page_size = page_size
        self.pool = SWAKVPool(
            SIZE, WINDOW_SIZE, page_size, torch.bfloat16, HEADS, DIM, WINDOWED, OTHERS, "cpu"
        )
        torch.manual_seed(seed)
        for layer in WINDOWED + OTHERS:
            for buffer in self.pool.get_kv_buffer(layer):
                buffer.normal_()
        self.allocator = SWATokenToKVPoolAllocator(
            SIZE, WINDOW_SIZE, page_size, torch.bfloat16, "cpu", self.pool, need_sort=False
        )
        args = KVArgs()
        args.kv_data_ptrs, args.kv_data_lens, args.kv_item_lens = get_kv_transfer_buf_infos(self.pool)
        args.kv_layer_ids, args.page_size, args.kv_cache_dtype_str = [], page_size, "auto"
        setup_state_kv_args(args, self.pool, total_kv_layers=len(WINDOWED + OTHERS))
        windows = window_layers(args, MODEL, 1, 1)
        shape = PoolShape("m", "bf16", len(WINDOWED + OTHERS), HEADS, HEADS, False, 0, 1, 0, 1, "", windows)
        self.view = cache_view(args, shape)
        config = KVTransportConfig(backend="tcp", host="127.0.0.1")
        self.core = EngineCore(config, rank=0, schema=cache_schema(self.view, shape))
        self.core.register_memory(self.view.extents())
        self.core.start()

    def allocate(self, tokens: int, window_tokens: int | None = None) -> Any:
        """Slots of a prompt; ``window_tokens``: decode keeps no more in the windows' pool, None: all."""
        import torch

        if self.page_size == 1:
            return self.allocator.alloc(tokens)
        ends = torch.tensor([tokens])
        more: dict[str, Any] = {} if window_tokens is None else {"swa_tail_len": window_tokens}
        extend = (
            self.allocator.alloc_extend if window_tokens is None else self.allocator.alloc_extend_swa_tail
        )
        begin, last = torch.zeros(1, dtype=torch.int64), torch.tensor([-1])
        return extend(begin, begin, ends, ends, last, tokens, **more)

    def window_indices(self, slots: Any, begin: int) -> Any:
        """Of the tokens from ``begin`` on, as SGLang's decode names them."""
        from sglang.srt.mem_cache.common import kv_to_page_indices

        aligned = begin // self.page_size * self.page_size
        swa = self.allocator.translate_swa_indices_for_transfer(slots[aligned:])
        return kv_to_page_indices(swa, self.page_size)

    def rows(self, slots: Any, layers: list[int]) -> list[Any]:
        """K and V of these slots, by layer."""
        found = []
        for layer in layers:
            at = self.pool.translate_loc_from_full_to_swa(slots) if layer in WINDOWED else slots
            found += [buffer[at].clone() for buffer in self.pool.get_kv_buffer(layer)]
        return found


class Sender:
    """Takes what SGLang's prefill sends."""

    def __init__(self) -> None:
        self.pages: list[Any] = []
        self.states: Any = None

    def get_max_transfer_tokens(self) -> None:
        return None

    def should_send_kv_chunk(self, pages: int, last: bool) -> bool:
        return True

    def send(self, pages: Any, states: Any, num_kv_tokens: int) -> None:
        self.pages.append(pages)
        self.states = states


def sent_by_sglang(side: Side, slots: Any, chunks: list[int]) -> Sender:
    """What SGLang's own prefill names of a prompt that was computed in chunks, which end at these tokens."""
    import torch
    from sglang.srt.disaggregation.base.conn import StateType
    from sglang.srt.disaggregation.prefill import SchedulerDisaggregationPrefillMixin as Prefill

    tokens, sender = chunks[-1], Sender()
    args = SimpleNamespace(state_types=[StateType.SWA])
    scheduler: Any = SimpleNamespace(
        token_to_kv_pool_allocator=side.allocator,
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(2, SIZE, dtype=torch.int64)),
        disagg_metadata_buffers=SimpleNamespace(set_buf=lambda _: None),
        disagg_prefill_bootstrap_queue=SimpleNamespace(kv_manager=SimpleNamespace(kv_args=args)),
        disagg_prefill_pending_chunk_rids=set(),
        sliding_window_size=WINDOW,
        enable_staging=False,
    )
    scheduler.req_to_token_pool.req_to_token[1, :tokens] = slots
    request: Any = SimpleNamespace(
        rid="r", start_send_idx=0, origin_input_ids=[0] * tokens, kv=SimpleNamespace(req_pool_idx=1),
        disagg_decode_prefix_len=0, disagg_kv_sender=sender, extend_end=0,
    )  # fmt: skip
    for end in chunks:
        request.extend_end = end
        Prefill._send_kv_chunk(scheduler, request, last_chunk=end == tokens)
    return sender


@pytest.fixture
def sides(request: pytest.FixtureRequest) -> Iterator[tuple[Side, Side]]:
    prefill, decode = (Side(size, seed) for seed, size in enumerate(request.param))
    yield prefill, decode
    prefill.core.close()
    decode.core.close()


@pytest.mark.parametrize("sides", [(1, 1), (16, 16), (16, 32), (32, 16), (1, 16)], indirect=True)
@pytest.mark.parametrize("tokens", [5, 24, 25, 32, 41, 56, 57, 100, 150])
@pytest.mark.parametrize("chunked", [False, True])
def test_what_sglang_keeps_of_a_prompt_lands_where_sglang_looks_for_it(
    sides: tuple[Side, Side], tokens: int, chunked: bool
) -> None:
    prefill, decode = sides
    decode.allocate(32)  # the two sides' page numbers differ
    begin = max(0, tokens - WINDOW)
    theirs = prefill.allocate(tokens)
    size = decode.page_size
    ours = decode.allocate(tokens, tokens - begin // size * size)
    chunks = [*([30, 60] if chunked else []), tokens]
    sent = sent_by_sglang(prefill, theirs, [end for end in chunks if end <= tokens])
    if begin >= prefill.page_size:  # as prefill does with what has left the window
        prefill.allocator.free_swa(theirs[: begin // prefill.page_size * prefill.page_size])

    source = PagedSource(prefill.view, 0)
    released: list[Outcome] = []
    prefill.core.offer("t", source, released.append)
    for pages in sent.pages:
        prefill.core.update("t", source.append, 0, pages)
    places = source.tables.length(0)
    prefill.core.update("t", source.append, WINDOW_GROUP, window_table(sent.states, places))
    prefill.core.update("t", source.end_here)
    prefill.core.finish("t")

    ids = (ours[::size] // size).numpy()
    windows = window_pages([decode.window_indices(ours, begin)], len(ids), size, begin)
    full = GroupPages(0, ((0, len(ids)),), ids.astype("int64"), range(len(ids) * size))
    wanted = Wanted("t", PagesTarget(decode.view, (full, windows)), True, 10.0)
    landed, outcomes = Event(), []

    def done(outcome: Outcome) -> None:
        outcomes.append(outcome)
        landed.set()

    peer = PeerAddress(prefill.core.engine_id, 0, prefill.core.addresses)
    decode.core.subscribe(peer, wanted, done)
    assert landed.wait(20) and outcomes[0].ok, outcomes
    for layers, first in ((OTHERS, 0), (WINDOWED, begin)):
        for there, here in zip(
            prefill.rows(theirs[first:], layers), decode.rows(ours[first:], layers), strict=True
        ):
            assert there.equal(here)
