# SPDX-License-Identifier: Apache-2.0
"""vLLM's real scheduler, our connector's two halves and the real producer, over a simulated forward pass.

A token's KV in a layer is a number: a hash of the number before it and of the token. So it is right only if it was
computed after what it depends on, and in the right page. The model "runs" when the simulation says so: one step
behind the scheduler where scheduling is asynchronous. Subscribers come at any time, to each rank at another one; what
is posted is compared with the right numbers when it is posted and again when it was sent, some steps later. vLLM steps
only while it has reason to. Everything follows one seed.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import (
    MultiKVConnectorMetadata,
    MultiKVConnectorWorkerMetadata,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from sage_kv_connector.backends.base import Capabilities, Descriptors, Event, EventKind, Status
from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.cache_view import KVCacheView, group_view
from sage_kv_connector.contract.failure import Code, Reason
from sage_kv_connector.contract.plan import TransportPlan
from sage_kv_connector.contract.prompt import Prompt
from sage_kv_connector.engine.control.timers import Timer, Timers
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.session.agreement import SchemaVerdict
from sage_kv_connector.engine.transfer.producer import Producer
from sage_kv_connector.integrations.vllm import plugin
from sage_kv_connector.integrations.vllm.completions import Completions
from sage_kv_connector.integrations.vllm.connector import SageKVConnector
from sage_kv_connector.integrations.vllm.metadata import (
    SageKVConnectorMetadata,
    SageKVHandshakeMetadata,
    SageKVWorkerMetadata,
)
from sage_kv_connector.integrations.vllm.prefill import PrefillHalf
from sage_kv_connector.telemetry.recording.recorder import Recorder

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ROOT / "integration_tests" / "recall_model"
PAGE = 4
LAYERS = 2
WINDOW = 10
BLOCKS = 26
MAX_PROMPT = 9 * PAGE
#: What the scheduler's half takes a step for, in seconds.
STEP_S = 0.1
#: Of so many steps the last ones bring no new requests.
TIDE, EBB = 60, 20
Numbers = npt.NDArray[np.int64]


class Variant(NamedTuple):
    """``others``: "" or how another connector loads ("sync", "async"). ``window``: a second, sliding group.

    ``ranks``: workers of the engine. ``vllm_holds``: it gives its connectors no block pool, as before 0.30.
    """

    asynchronous: bool = False
    others: str = ""
    window: bool = False
    ranks: int = 1
    vllm_holds: bool = False

    @property
    def name(self) -> str:
        words = ["async" if self.asynchronous else "sync"]
        words += [f"store-{self.others}"] if self.others else []
        words += ["window"] if self.window else []
        words += [f"{self.ranks}-ranks"] if self.ranks > 1 else []
        return "+".join([*words, *(["vllm-holds"] if self.vllm_holds else [])])


VARIANTS = [
    *(Variant(a, o, w) for a in (False, True) for o in ("", "sync", "async") for w in (False, True)),
    Variant(ranks=2),
    Variant(asynchronous=True, window=True, ranks=2),
    Variant(others="async", ranks=2),
    Variant(vllm_holds=True),
    Variant(asynchronous=True, others="async", ranks=2, vllm_holds=True),
]


def kv_numbers(tokens: list[int], layer: int) -> Numbers:
    """What the layer holds of these tokens, if it was computed right."""
    out = np.empty(len(tokens), dtype=np.int64)
    number = layer + 1
    for i, token in enumerate(tokens):
        number = next_number(number, token)
        out[i] = number
    return out


def next_number(before: int, token: int) -> int:
    return (before * 1103515245 + token * 40503 + 12345) & 0x7FFFFFFFFFFFFFFF


class _InlineLoop:
    """Runs what is submitted at once; timers fire when the simulation says so."""

    def __init__(self) -> None:
        self.timers: list[Timer] = []
        self._all = Timers()

    def call_later(self, delay_s: float, function: Callable[..., object], *arguments: Any) -> Timer:
        timer = self._all.add(delay_s, function, arguments)
        self.timers.append(timer)
        return timer

    def take(self, name: str) -> list[Timer]:
        """Live timers of functions of this name."""
        self.timers = [timer for timer in self.timers if not timer.cancelled]
        return [timer for timer in self.timers if timer._call is not None and timer._call[0].__name__ == name]


class _InlineCore:
    """What ``PrefillHalf`` needs of an ``EngineCore``, without its thread."""

    def __init__(self, producer: Producer, recorder: Recorder) -> None:
        self.recorder = recorder
        self._producer = producer
        self.is_streaming = producer.is_streaming
        self.advanced = producer.pump
        self.finish = producer.finish
        self.offer = producer.offer

    def register_host_memory(self, address: int, length: int) -> None: ...

    def withdraw(self, transfer_ids: Any, detail: str) -> None:
        self._producer.withdraw(transfer_ids, Reason(Code.WITHDRAWN, detail))

    def give_up(self, transfer_ids: Any, why: Reason) -> None:
        self._producer.give_up(transfer_ids, why)


class _Post(NamedTuple):
    id: int
    subscriber: Subscriber
    descriptors: Descriptors


class Subscriber:
    """A decode side of one rank: a session with one subscription. Bytes "arrive" when their post was sent."""

    peer, label = None, "decode"
    plan = TransportPlan("memory", "direct", "", 1, False)
    verdict = SchemaVerdict()
    connection = 1
    capabilities = Capabilities("memory", rank=0, crosses_nodes=False)

    def __init__(self, simulation: Simulation, rank: Rank, request: Request) -> None:
        self.backend = self
        self.simulation = simulation
        self.rank = rank
        self.failed = False
        self.arrived = 0
        prompt = list(request.prompt_token_ids or ())
        right, known, runs = [], [], []
        for group, (size, window) in enumerate(simulation.groups):
            first = max(0, len(prompt) - window + 1) // size if window else 0
            end = -(-len(prompt) // size)
            runs.append(m.PageRuns(group, ((first, end - first),)))
            for layer in range(LAYERS):
                numbers = np.zeros(end * size, dtype=np.int64)
                numbers[: len(prompt)] = kv_numbers(prompt, layer + LAYERS * group)
                right.append(numbers[first * size :])
                known.append((np.arange(end * size) < len(prompt))[first * size :])
        self.right, self.known, self.selection = np.concatenate(right), np.concatenate(known), tuple(runs)

    def hold(self) -> None: ...

    def drop(self) -> None: ...

    def mode(self, **_: bool) -> str:
        return self.plan.mode

    def send(self, message: Any) -> None:
        self.failed = self.failed or isinstance(message, m.Failed)

    def cancel(self, post: int) -> None:
        self.simulation.posts.pop(post, None)

    def post(
        self,
        connection: int,
        window_descriptor: bytes,
        descriptors: Descriptors,
        generation: int,
        *,
        checksum: bool,
    ) -> int:
        one = _Post(self.simulation.new_id(), self, descriptors.copy())
        self.simulation.posts[one.id] = one
        self.simulation.posted += 1
        self.compare(one, "when it was posted")
        return one.id

    def compare(self, post: _Post, when: str) -> None:
        for address, offset, length in post.descriptors.tolist():
            numbers = self.rank.read(address, length)
            place = slice(offset // 8, (offset + length) // 8)
            if ((numbers != self.right[place]) & self.known[place]).any():
                self.simulation.differences.append(f"step {self.simulation.steps}: wrong bytes {when}")
                return


class StoreLoad(NamedTuple):
    """Tokens from ``first`` up to ``end``, into these blocks by group."""

    request_id: str
    prompt: list[int]
    ids: tuple[list[int], ...]
    first: int
    end: int


class StoreMetadata(KVConnectorMetadata):  # type: ignore[misc]
    def __init__(self, loads: list[StoreLoad], saves: list[str]) -> None:
        self.loads, self.saves = loads, saves


class StoreConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Another connector beside ours: claims whole pages of some prompts, and keeps some requests when they ended.

    Its worker's part is the simulation's.
    """

    rng = random.Random()
    how = "sync"

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._loads: list[StoreLoad] = []
        self._saves: list[str] = []
        self._asked: dict[str, tuple[int, int]] = {}

    def get_num_new_matched_tokens(self, request: Any, computed: int) -> tuple[int, bool]:
        most = (request.num_prompt_tokens - 1) // PAGE * PAGE
        if computed >= most or self.rng.random() < 0.5:
            return 0, False
        end = self.rng.randrange(computed + PAGE, most + 1, PAGE)
        self._asked[request.request_id] = (computed, end)
        return end - computed, self.how == "async"

    def update_state_after_alloc(self, request: Any, blocks: Any, external: int) -> None:
        if external:
            first, end = self._asked.pop(request.request_id)
            ids = tuple([block.block_id for block in group] for group in blocks.blocks)
            self._loads.append(StoreLoad(request.request_id, list(request.prompt_token_ids), ids, first, end))

    def build_connector_meta(self, output: Any) -> StoreMetadata:
        orders = StoreMetadata(self._loads, self._saves)
        self._loads, self._saves = [], []
        return orders

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        saves = request.status == RequestStatus.FINISHED_LENGTH_CAPPED and self.rng.random() < 0.3
        self._saves += [request.request_id] if saves else []
        return saves, None

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        return tuple(range(len(self._kv_cache_config.kv_cache_groups)))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None: ...

    def wait_for_layer_load(self, layer_name: str) -> None: ...

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None: ...

    def wait_for_save(self) -> None: ...


@cache
def vllm_config(variant: Variant) -> Any:
    """Shared by all simulations of a variant: they change nothing in it."""
    plugin.register()
    if "SimulatedStore" not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector("SimulatedStore", __name__, "StoreConnector")
    transfer: dict[str, Any] = {"kv_connector": "sage_kvt", "kv_role": "kv_producer"}
    # "recompute" leaves bad blocks of a synchronous load in vLLM 0.32's prefix cache until they are computed.
    transfer["kv_load_failure_policy"] = "fail" if variant.others == "sync" else "recompute"
    if variant.others:
        children = [{"kv_connector": "SimulatedStore", "kv_role": "kv_both"}, dict(transfer)]
        transfer |= {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": children}}
    config = EngineArgs(
        model=str(MODEL),
        max_model_len=256,
        block_size=PAGE,
        max_num_batched_tokens=24,
        max_num_seqs=6,
        enforce_eager=True,
        async_scheduling=variant.asynchronous,
        kv_transfer_config=transfer,
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = BLOCKS
    config.parallel_config.tensor_parallel_size = variant.ranks
    init_none_hash(sha256)
    return config


class _Running:
    """A request in the simulated worker: ``known`` tokens so far."""

    def __init__(self, tables: list[list[int]], known: int) -> None:
        self.tables = tables
        self.known = known


class Rank:
    """One of the engine's workers: its memory, and what of our worker's side needs no thread."""

    def __init__(self, number: int, groups: list[tuple[int, int]]) -> None:
        self.number = number
        self.memory: dict[tuple[int, int], Numbers] = {}
        views = []
        for group, (size, window) in enumerate(groups):
            layers = []
            for layer in range(LAYERS):
                tensor = torch.full((BLOCKS, size), -1, dtype=torch.int64)
                self.memory[group, layer] = tensor.numpy()
                layers.append((f"g{group}.l{layer}", [("kv", tensor, ("page", "token"))]))
            views.append(group_view("window" if window else "full", size, BLOCKS, layers))
        self._view = KVCacheView(tuple(views))
        self.loop = _InlineLoop()
        self.completions = Completions()
        self._others_to_come: dict[str, int] = {}
        self.register()

    def register(self) -> None:
        recorder = Recorder()
        self.producer = Producer(self.loop, KVTransportConfig(), None, recorder)  # type: ignore[arg-type]
        core: Any = _InlineCore(self.producer, recorder)
        audit: Any = _NoAudit()
        self.half = PrefillHalf(core, self._view, self.completions, audit)

    def report(self, orders: Any, saved: set[str]) -> KVConnectorOutput:
        """What it says at the end of a step; beside another connector, which ``saved`` these, as both together."""
        ended = self.completions.take()
        meta: Any = None
        if ended.released:
            meta = SageKVWorkerMetadata({hold: frozenset((self.number,)) for hold in ended.released})
        several = isinstance(orders, MultiKVConnectorMetadata)
        if several and meta is not None:
            meta = MultiKVConnectorWorkerMetadata((None, meta))
        if several and orders.extra_async_saves:
            self._others_to_come.update(orders.extra_async_saves)
        sent = {one for one in (*saved, *ended.sent) if self._others_to_come.pop(one, None) is None}
        return KVConnectorOutput(finished_sending=sent, kv_connector_worker_meta=meta)

    def expire(self) -> None:
        """Every lease that runs is over."""
        for lease in self.loop.take("_expired"):
            lease.fire()
            lease.cancel()

    def read(self, address: int, length: int) -> Numbers:
        for memory in self.memory.values():
            start = memory.ctypes.data
            if start <= address and address + length <= start + memory.nbytes:
                return memory.reshape(-1)[(address - start) // 8 : (address - start + length) // 8]
        raise AssertionError(f"{length} bytes at {address} are no KV")


class Simulation:
    """One engine from its start. ``step`` is some time, with a step of vLLM if it has reason to make one;
    ``differences`` stays empty.

    ``old_rule``: what vLLM counts as computed is taken as final before the forward pass. ``first_rank``: what one rank
    reports counts for all.
    """

    def __init__(
        self, seed: int, variant: Variant, *, old_rule: bool = False, first_rank: bool = False
    ) -> None:
        self.rng = random.Random(seed)
        self.variant = variant
        self.old_rule, self.first_rank = old_rule, first_rank
        self.differences: list[str] = []
        self.steps = self.posted = self.completed = self.sleeps = self.asleep = self._last_id = 0
        self.posts: dict[int, _Post] = {}
        self.groups = [(PAGE, 0), (PAGE, WINDOW)] if variant.window else [(PAGE, 0)]
        config = vllm_config(variant)
        StoreConnector.rng, StoreConnector.how = random.Random(seed), variant.others
        cache_config = self._caches()
        kind = AsyncScheduler if variant.asynchronous else Scheduler
        self.scheduler = kind(
            vllm_config=config,
            kv_cache_config=cache_config,
            structured_output_manager=StructuredOutputManager(config),
            block_size=PAGE,
        )
        self._hasher = get_request_block_hasher(PAGE, sha256)
        self._aggregator = KVOutputAggregator(variant.ranks)
        self._ranks = [Rank(number, self.groups) for number in range(variant.ranks)]
        self._ours = [
            connector
            for connector in (self.scheduler.connector, *getattr(self.scheduler.connector, "_connectors", ()))
            if isinstance(connector, SageKVConnector)
        ]
        for connector in self._ours:
            connector.scheduler_side._held._clock = lambda: self.steps * STEP_S
            if variant.vllm_holds:
                connector.scheduler_side.bind(None)
        self._shake_hands()
        self.offered: dict[tuple[str, int], tuple[str, Request]] = {}  #: by request and rank
        self._families = [self._tokens(self.rng.randrange(2, 8) * PAGE) for _ in range(3)]
        self._prompts: dict[str, list[int]] = {}
        self._running: dict[str, _Running] = {}
        self._ahead: deque[Any] = deque()
        self._loading: list[StoreLoad] = []
        self._saving: list[str] = []

    def _shake_hands(self) -> None:
        where = SageKVHandshakeMetadata(("memory://",), "node", "")
        for connector in self._ours:
            connector.set_xfer_handshake_metadata({rank.number: where for rank in self._ranks})

    def _caches(self) -> KVCacheConfig:
        specs = []
        for group, (size, window) in enumerate(self.groups):
            names = [f"g{group}.l{layer}" for layer in range(LAYERS)]
            shape: dict[str, Any] = {
                "block_size": size,
                "num_kv_heads": 1,
                "head_size": 8,
                "dtype": torch.float32,
            }
            spec = SlidingWindowSpec(sliding_window=window, **shape) if window else FullAttentionSpec(**shape)
            specs.append(KVCacheGroupSpec(names, spec))
        return KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=specs)

    # -- what happens

    def step(self) -> None:
        """Some requests, subscribers, aborts and resets; a schedule; a step of the workers, maybe a later one."""
        self.steps += 1
        self._people()
        self._work()
        for post in list(self.posts.values()):
            if self.rng.random() < 0.4:
                self._sent(post)

    def end(self) -> None:
        """Nobody comes any more, and what is on offer is not fetched: with one more request nothing is held."""
        self.offered.clear()
        self._all_ends("vLLM goes on stepping for nothing")
        self._add(offered=False)
        self._all_ends("a request waits for ever")
        pool = self.scheduler.kv_cache_manager.block_pool
        held = BLOCKS - 1 - pool.get_num_free_blocks()
        if held:
            self.differences.append(f"{held} blocks are held in the end")

    def _all_ends(self, otherwise: str) -> None:
        for _ in range(5 * EBB):
            on_offer = any(len(rank.half) for rank in self._ranks)
            if not (self._ahead or self.posts or on_offer or self.scheduler.has_requests()):
                return
            self.steps += 1
            self._work()
            for post in list(self.posts.values()):
                self._sent(post)
            for rank in self._ranks:
                rank.expire()
        self.differences.append(otherwise)

    def _work(self) -> None:
        """What vLLM's engine does next: make a step, wait for the one that is under way, or fall asleep."""
        if self.scheduler.has_requests():
            output = self.scheduler.schedule()
            self._ahead.append(output)
            depth = 2 if self.variant.asynchronous else 1
            if len(self._ahead) < depth and output.total_num_scheduled_tokens and self.rng.random() < 0.7:
                return
        if self._ahead:
            self._execute(self._ahead.popleft())
        else:
            self.asleep += 1

    def _people(self) -> None:
        rng = self.rng
        comes = self.steps % TIDE < TIDE - EBB
        if comes and len(self.scheduler.requests) < 8 and rng.random() < 0.5:
            for _ in range(rng.choice((1, 1, 1, 2, 4))):
                self._add()
        waiting = sorted(self.offered)
        if waiting and rng.random() < 0.6:
            self._subscribe(*rng.choice(waiting))
        if self.scheduler.requests and rng.random() < 0.04:
            request_id = rng.choice(sorted(self.scheduler.requests))
            self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
            for rank in self._ranks:
                self.offered.pop((request_id, rank.number), None)
        if rng.random() < 0.03:
            try:
                self.scheduler.reset_prefix_cache(reset_running_requests=True)
            except RuntimeError:
                pass  # a request waits for a load
        if rng.random() < 0.1:
            self._sleep()
        if rng.random() < 0.1:
            rng.choice(self._ranks).expire()

    def _sleep(self) -> None:
        """As vLLM does it in mode "keep": what is held drains, all that runs is preempted, the cache is lost."""
        self.scheduler.set_pause_state(PauseState.PAUSED_ALL)
        self._drains(True)
        for _ in range(8):
            for rank in self._ranks:
                rank.expire()
            if self.scheduler.has_requests():
                self._ahead.append(self.scheduler.schedule())
            while self._ahead:
                self._execute(self._ahead.popleft())
        self.scheduler.set_pause_state(PauseState.UNPAUSED)
        self._drains(False)
        try:
            self.scheduler.reset_prefix_cache(reset_running_requests=True)
        except RuntimeError:
            return  # a request waits for a load, or for its pages to be fetched
        self.sleeps += 1
        for rank in self._ranks:
            rank.half.void("vLLM discards its KV cache (sleep)")
        assert not self.posts, "discarded memory is read"
        for rank in self._ranks:
            for memory in rank.memory.values():
                memory[:] = -9
            rank.register()
        self._shake_hands()

    def _drains(self, draining: bool) -> None:
        for connector in self._ours:
            connector.drains(draining)

    def _add(self, *, offered: bool | None = None) -> None:
        rng = self.rng
        family = rng.choice(self._families)
        prompt = (family[: rng.randrange(1, len(family) + 1)] + self._tokens(rng.randrange(PAGE * 2)))[
            :MAX_PROMPT
        ]
        number = self.new_id()
        offered = rng.random() < 0.75 if offered is None else offered
        sampling = SamplingParams(
            max_tokens=1 if offered and rng.random() < 0.9 else rng.randrange(1, 6), ignore_eos=True
        )
        if offered:
            sampling.extra_args = {
                "kv_transfer_params": {"do_remote_decode": True, "transfer_id": f"t{number}"}
            }
        request = Request(f"r{number}", prompt, sampling, None, block_hasher=self._hasher)
        self._prompts[request.request_id] = prompt
        if offered:
            for rank in self._ranks:
                self.offered[request.request_id, rank.number] = (f"t{number}", request)
        self.scheduler.add_request(request)

    def _subscribe(self, request_id: str, number: int) -> None:
        transfer_id, request = self.offered.pop((request_id, number))
        rank = self._ranks[number]
        subscriber: Any = Subscriber(self, rank, request)
        rank.producer.on_subscribe(
            subscriber,
            m.Subscribe(
                transfer_id=transfer_id,
                generation=self.new_id(),
                window=b"",
                nbytes=8 * len(subscriber.right),
                selection=subscriber.selection,
                checksum=False,
                finished=False,
                timeout_ms=1000,
                prompt=Prompt(request.prompt_token_ids).whole,
            ),
        )

    def _sent(self, post: _Post) -> None:
        """The lanes have read the last byte of it."""
        if self.posts.pop(post.id, None) is None:
            return
        subscriber = post.subscriber
        subscriber.compare(post, "when it was sent")
        subscriber.arrived += int(post.descriptors[:, 2].sum())
        if subscriber.arrived == 8 * len(subscriber.right) and not subscriber.failed:
            self.completed += 1
        session: Any = subscriber
        subscriber.rank.producer.on_sent(
            session, Event(EventKind.SENT, 1, post.id, Status.OK, 0, 0, 0, b"", "")
        )

    # -- the simulated workers

    def _execute(self, output: Any) -> None:
        ours, store = output.kv_connector_metadata, None
        if self.variant.others:
            store, ours = ours.metadata
        assert isinstance(ours, SageKVConnectorMetadata)
        for rank in self._ranks:
            rank.half.withdraw(ours.withdrawn)
        computed = self._update_states(output)
        for rank in self._ranks:
            rank.half.begin_step(ours.offers, ours.progress)
            if self.old_rule:
                for progress in ours.progress:
                    source = rank.half._on_offer[progress.transfer_id].source
                    before = tuple(computed[progress.request_id] // size for size, _ in self.groups)
                    source.advance_all(before)
                    rank.producer.pump(progress.transfer_id)
            for finished in ours.finished:
                rank.half.finish(finished)
        loaded = self._load(store.loads) if store is not None else KVConnectorOutput()
        saved = self._save(store.saves) if store is not None else set()
        ids = list(output.num_scheduled_tokens)
        results = []
        for rank in self._ranks:
            for group in range(len(self.groups)):
                for layer in range(LAYERS):
                    self._forward(rank, group, layer, output.num_scheduled_tokens, computed)
                    rank.half.layer_saved(f"g{group}.l{layer}")
            rank.half.end_forward()
            report = rank.report(output.kv_connector_metadata, saved)
            report.finished_recving = loaded.finished_recving
            report.failed_recving = loaded.failed_recving
            report.invalid_block_ids = loaded.invalid_block_ids
            results.append(ModelRunnerOutput(ids, {}, [], kv_connector_output=report))
        result = self._aggregator.aggregate(results)
        if self.first_rank:
            self._count_for_all(result.kv_connector_output.kv_connector_worker_meta)
        result.req_id_to_index = {request_id: i for i, request_id in enumerate(ids)}
        result.sampled_token_ids = [
            self._sample(i, computed[i] + output.num_scheduled_tokens[i]) for i in ids
        ]
        self.scheduler.update_from_output(output, result)

    def _count_for_all(self, meta: Any) -> None:
        ours = meta.metadata[1] if isinstance(meta, MultiKVConnectorWorkerMetadata) else meta
        if ours is not None:
            ours.released = dict.fromkeys(ours.released, frozenset(range(self.variant.ranks)))

    def _update_states(self, output: Any) -> dict[str, int]:
        for request_id in output.finished_req_ids:
            self._running.pop(request_id, None)
        computed = {}
        for new in output.scheduled_new_reqs:
            tokens = new.prefill_token_ids or new.prompt_token_ids
            self._running[new.req_id] = _Running([list(ids) for ids in new.block_ids], len(tokens))
            computed[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            running, ids = self._running[request_id], cached.new_block_ids[i]
            computed[request_id] = cached.num_computed_tokens[i]
            if request_id in cached.resumed_req_ids:
                running.tables = [list(more) for more in ids]
                running.known = len(self._prompts[request_id]) + cached.num_output_tokens[i]
            else:
                for table, more in zip(running.tables, ids or (), strict=False):
                    table.extend(more)
        return computed

    def _forward(
        self, rank: Rank, group: int, layer: int, scheduled: dict[str, int], computed: dict[str, int]
    ) -> None:
        memory, (size, _) = rank.memory[group, layer], self.groups[group]
        for request_id, count in scheduled.items():
            table = self._running[request_id].tables[group]
            place = computed[request_id]
            before = (
                int(memory[table[(place - 1) // size], (place - 1) % size])
                if place
                else layer + LAYERS * group + 1
            )
            for position in range(place, place + count):
                before = next_number(before, self._token(request_id, position))
                memory[table[position // size], position % size] = before

    def _sample(self, request_id: str, after: int) -> list[int]:
        running = self._running[request_id]
        if after < running.known:
            return []
        running.known = after + 1
        return [self._token(request_id, after)]

    def _load(self, loads: list[Any]) -> KVConnectorOutput:
        """The other connector's workers: now, or some steps later; one in five fails."""
        report = KVConnectorOutput()
        self._loading += loads
        for load in list(self._loading):
            if self.variant.others == "async" and self.rng.random() < 0.6:
                continue
            self._loading.remove(load)
            request_id, prompt, tables, first, end = load
            several = len(self.groups) > 1
            # Synchronous loads fail only where vLLM 0.32 gets that right by itself: with several groups it takes
            # failures of whole requests only, and running ahead it lets others hit what was computed from them.
            may_fail = self.variant.others == "async" or not (several or self.variant.asynchronous)
            failed = may_fail and self.rng.random() < 0.2
            for rank in self._ranks:
                for (group, layer), memory in rank.memory.items():
                    numbers = kv_numbers(prompt[:end], layer + LAYERS * group)
                    ids = tables[group]
                    for position in range(first, end):
                        if ids[position // PAGE]:
                            memory[ids[position // PAGE], position % PAGE] = (
                                -7 if failed else numbers[position]
                            )
            if failed and several:
                report.failed_recving.add(request_id)
            elif failed:
                report.invalid_block_ids |= set(tables[0][first // PAGE : end // PAGE])
            if self.variant.others == "async":
                report.finished_recving = (report.finished_recving or set()) | {request_id}
        return report

    def _save(self, request_ids: list[str]) -> set[str]:
        """Whom the other connector keeps no more: each some steps after its end."""
        self._saving += request_ids
        saved = {one for one in self._saving if self.rng.random() < 0.5}
        self._saving = [one for one in self._saving if one not in saved]
        return saved

    # -- small things

    def new_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _token(self, request_id: str, position: int) -> int:
        prompt = self._prompts[request_id]
        return prompt[position] if position < len(prompt) else 1000 + position

    def _tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(1, 250) for _ in range(count)]


class _NoAudit:
    def sent(self, source: Any, outcome: Any) -> None: ...
