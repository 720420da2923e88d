# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench control``: interpreter time of a hand-over, on the control threads and on the engines' own.

Two engines with small pages in one process: what counts is how many descriptors there are, not how many bytes, but for
what is converted in parts of so many bytes (``dim``). CPU time is that of each thread alone (its own clock), so what
else runs meanwhile does not count. Modes: ``whole`` (decode asks when prefill is over), ``streamed`` (decode waits;
layers become final one after the other), ``converted`` (prefill's pages of 16 tokens to decode's of 64).
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from sage_kv_connector.bench.contender import Contender, ContenderError
from sage_kv_connector.bench.first_byte import first_byte_us
from sage_kv_connector.bench.transfer import PEERS
from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.console import progress
from sage_kv_connector.contract.cache_view import CanonicalPlane, KVCacheView, group_view
from sage_kv_connector.contract.element_order import strided
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.engine import EngineCore, PagedSource, PagesTarget, Step, Wanted
from sage_kv_connector.engine.pages.target import one_run

HEADS, DIM, ITEM = 1, 16, 2
PAGE, LARGE_PAGE = 16, 64
#: A layer's forward pass on a fast engine.
LAYER_S = 200e-6
WARM_UP = 3
TIMEOUT_S = 60.0
FIRST_BYTES = 300
MODES = ("whole", "streamed", "converted")


class Cost(NamedTuple):
    """CPU of one hand-over: both control threads, both engines' threads; ``layer_us``: of them for one layer's end."""

    prefill_ms: float
    decode_ms: float
    engine_thread_ms: float
    decode_engine_thread_ms: float
    layer_us: float


class Side:
    """An engine and its cache, whose pages no two of which lie beside each other; ``dim`` channels a head.

    ``options``: of the transport.
    """

    def __init__(
        self,
        backend: str,
        layers: int,
        tokens: int,
        page: int,
        seed: int,
        dim: int = DIM,
        **options: Any,
    ) -> None:
        self.pages, self._tokens = -(-tokens // page), tokens
        shape = (2 * self.pages, HEADS, page, 2 * dim)
        self._cache = [np.full(shape, seed, dtype=np.uint16) for _ in range(layers)]
        token = 2 * dim * ITEM
        orders = [strided(first * dim * ITEM, page * token, token, ITEM) for first in (0, 1)]
        canonical = tuple(CanonicalPlane(name, dim, 0, orders[i]) for i, name in enumerate("kv"))
        axes = ("page", "head", "token", "content")
        named = [(f"layers.{i}", [("kv", tensor, axes)]) for i, tensor in enumerate(self._cache)]
        group = group_view("fullattention", page, 2 * self.pages, named, heads=HEADS, canonical=canonical)
        self.view = KVCacheView((group,))
        schema = KVCacheSchema("bench", "m", "bf16", layers, HEADS, 0, HEADS, dim, (group.schema(),))
        config = KVTransportConfig(backend=backend, host="127.0.0.1", **options)
        self.core = EngineCore(config, schema=schema)
        self.core.register_memory(self.view.extents())
        self.core.start()
        self.ids = 2 * np.random.default_rng(seed).permutation(self.pages)

    def begin_step(self, *sources: PagedSource) -> Step:
        """A step that computes the whole prompt of each."""
        step = Step()
        for source in sources:
            source.grow(0, self.ids)
            source.end((self.pages,))
            step.add(source.tables, (self.pages,))
        return step

    def wanted(self, name: str, *, finished: bool) -> Wanted:
        """The whole prompt, into this side's pages."""
        pages = one_run(0, 0, self.ids, range(self._tokens))
        return Wanted(name, PagesTarget(self.view, (pages,)), finished, TIMEOUT_S)

    def filled_with(self, value: int) -> bool:
        """Every token of the request; what lies behind them in the last page is nobody's."""
        by_token = [tensor[self.ids].transpose(0, 2, 1, 3) for tensor in self._cache]
        rows = [tensor.reshape(-1, HEADS * tensor.shape[-1])[: self._tokens] for tensor in by_token]
        return all(bool((row == value).all()) for row in rows)

    def control_ms(self) -> float:
        """CPU of the control thread so far."""
        clock = time.pthread_getcpuclockid(self.core.control_thread)
        return time.clock_gettime(clock) * 1e3


def _timed(spent: list[float], function: Callable[..., Any], *arguments: Any) -> Any:
    """The engine's own thread calls this."""
    begun = time.thread_time()
    try:
        return function(*arguments)
    finally:
        spent[0] += (time.thread_time() - begun) * 1e3


class Handover:
    """One transfer between two sides; what each engine's thread spends is counted apart."""

    def __init__(self, prefill: Side, decode: Side, name: str) -> None:
        self._prefill, self._decode, self._name = prefill, decode, name
        self._on_prefill, self._on_decode, self._on_layers = [0.0], [0.0], [0.0]
        self._ended: queue.Queue[Outcome] = queue.Queue()

    def run(self, mode: str) -> Cost:
        prefill, decode = self._prefill, self._decode
        before = prefill.control_ms(), decode.control_ms()
        source = _timed(self._on_prefill, self._offer)
        step = _timed(self._on_prefill, prefill.begin_step, source)
        if mode == "streamed":
            _timed(self._on_decode, self._subscribe, False)
            while not prefill.core.is_streaming(self._name):
                time.sleep(0.001)
            for layer in range(len(prefill.view.groups[0].layers)):
                time.sleep(LAYER_S)
                _timed(self._on_layers, self._layer_saved, step, layer)
        _timed(self._on_prefill, self._end_step, step)
        if mode != "streamed":
            _timed(self._on_decode, self._subscribe, True)
        outcome = self._ended.get(timeout=TIMEOUT_S)
        if not outcome.ok:
            raise RuntimeError(f"a hand-over failed: {outcome.error}")
        while prefill.core.counters()["offers"]:
            time.sleep(0.001)
        layers = len(prefill.view.groups[0].layers)
        return Cost(
            prefill.control_ms() - before[0],
            decode.control_ms() - before[1],
            self._on_prefill[0] + self._on_layers[0],
            self._on_decode[0],
            self._on_layers[0] * 1e3 / layers,
        )

    def _offer(self) -> PagedSource:
        source = PagedSource(self._prefill.view)
        self._prefill.core.offer(self._name, source, lambda _: None)
        return source

    def _layer_saved(self, step: Step, layer: int) -> None:
        step.layer(0, layer)
        self._prefill.core.advanced(self._name)

    def _end_step(self, step: Step) -> None:
        step.all()
        self._prefill.core.advanced(self._name)
        self._prefill.core.finish(self._name)

    def _subscribe(self, finished: bool) -> None:
        wanted = self._decode.wanted(self._name, finished=finished)
        core = self._prefill.core
        peer = PeerAddress(core.engine_id, 0, core.addresses)
        self._decode.core.subscribe(peer, wanted, self._ended.put)


def _measure(mode: str, backend: str, layers: int, tokens: int, dim: int, repeats: int) -> dict[str, Any]:
    prefill = Side(backend, layers, tokens, PAGE, 1, dim)
    decode = Side(backend, layers, tokens, LARGE_PAGE if mode == "converted" else PAGE, 2, dim)
    costs = []
    try:
        for number in range(WARM_UP + repeats):
            costs.append(Handover(prefill, decode, f"t{number}").run(mode))
        right = decode.filled_with(1)
    finally:
        decode.core.close()
        prefill.core.close()
    figures = {name: median(getattr(cost, name) for cost in costs[WARM_UP:]) for name in Cost._fields}
    return {"mode": mode, "backend": backend, "layers": layers, "tokens": tokens, "right": right, **figures}


def _nixl(backend: str, layers: int, length: int, dim: int, repeats: int) -> dict[str, Any]:
    """What NIXL takes from the thread that asks it for as many descriptors; its lists are prepared before."""
    program = PEERS["nixl"]
    page_bytes = HEADS * PAGE * 2 * dim * ITEM
    total = layers * -(-length // PAGE) * page_bytes
    transport = program.across if backend == "tcp" else program.on_node
    row = {"mode": "nixl", "backend": f"{backend} ({transport})", "layers": layers, "tokens": length}
    try:
        peer = Contender(program.program, (transport, str(page_bytes), str(total)))
    except ContenderError as error:
        return {**row, "why": str(error)}
    try:
        costs = [float(peer.ask("cost")["cost_ms"]) for _ in range(WARM_UP + repeats)][WARM_UP:]
        return {**row, "engine_thread_ms": median(costs), "right": bool(peer.ask("verify")["verified"])}
    except ContenderError as error:
        return {**row, "why": str(error)}
    finally:
        peer.close()


def bench_control(
    backends: list[str],
    layers: int,
    tokens: list[int],
    modes: list[str],
    repeats: int,
    *,
    dim: int = DIM,
    nixl: bool = False,
) -> dict[str, Any]:
    """``rows``: a hand-over's CPU by mode, backend and length, in milliseconds; medians over ``repeats``.

    ``dim``: channels of K, and of V, of a token in a layer, 2 bytes each.
    ``peers``: what NIXL takes from its caller for as many descriptors, or why it can't be said.
    ``first_byte``: of each backend, microseconds from a layer's end, and from a step's, to a page's place at decode.
    """
    rows = []
    for backend in backends:
        for length in tokens:
            for mode in modes:
                progress.print(f"{mode} over {backend}: {layers} layers, {length} tokens")
                rows.append(_measure(mode, backend, layers, length, dim, repeats))
    peers = [
        _nixl(backend, layers, length, dim, repeats) for backend in backends for length in tokens if nixl
    ]
    first = [first_byte_us(backend, FIRST_BYTES) for backend in backends]
    return {
        "rows": rows,
        "peers": peers,
        "first_byte": first,
        "page": PAGE,
        "large_page": LARGE_PAGE,
        "dim": dim,
        "repeats": repeats,
    }


def control_rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The result as a table for people."""
    for row in result["rows"]:
        yield (
            f"{row['mode']}, {row['backend']}, {row['layers']} layers, {row['tokens']} tokens",
            f"prefill {row['prefill_ms']:.2f} ms, decode {row['decode_ms']:.2f} ms; engines' threads "
            f"{row['engine_thread_ms']:.2f} and {row['decode_engine_thread_ms']:.2f} ms, a layer "
            f"{row['layer_us']:.1f} µs" + ("" if row["right"] else ", WRONG BYTES"),
        )
    for row in result["peers"]:
        cost = row.get("why") or f"{row['engine_thread_ms']:.2f} ms of the thread that asks"
        yield f"NIXL, {row['backend']}, {row['layers']} layers, {row['tokens']} tokens", cost
    for first in result["first_byte"]:
        yield (
            f"first page after a layer's end, and a step's, {first['backend']}",
            f"{first['layer_us_p50']:.1f} µs (p99 {first['layer_us_p99']:.1f}), "
            f"{first['step_us_p50']:.1f} µs (p99 {first['step_us_p99']:.1f})",
        )
