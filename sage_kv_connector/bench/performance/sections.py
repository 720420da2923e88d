# SPDX-License-Identifier: Apache-2.0
"""The page's sections: the commands that measure, what makes a table of their JSON, and what was promised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sage_kv_connector.bench.goal import Goal
from sage_kv_connector.bench.performance import devices, interpreter, servers, transport
from sage_kv_connector.bench.performance.table import Results

#: What ``sage-kvt`` runs; anything else is a module.
BENCH = "bench "


@dataclass(frozen=True)
class Section:
    """``commands``: ``bench NAME …`` of ``sage-kvt``, or a module of the checkout and its words; each prints JSON.

    ``table``: lines of their results, in this order.
    """

    commands: tuple[str, ...]
    table: Callable[[Results], Iterator[str]]
    goals: tuple[Goal, ...] = ()


_TRANSFER = (
    "bench transfer --backend {} --block-bytes {} --total-bytes 268435456 --against nixl,mooncake,limit"
)

SECTIONS = {
    "transfer": Section(
        tuple(
            _TRANSFER.format(backend, block) for backend in ("shm", "tcp") for block in (4096, 65536, 1048576)
        ),
        transport.transfers,
        transport.TRANSFER_GOALS,
    ),
    "handover": Section(
        ("bench handover --against nixl,mooncake --repeats 3",), servers.hand_overs, servers.HAND_OVER_GOALS
    ),
    "routed": Section(("bench routed --against nixl --repeats 3",), servers.routed, servers.ROUTED_GOALS),
    "control": Section(
        (
            "bench control --tokens 1024,8192 --repeats 9 --against nixl",
            "bench control --modes converted --layers 40 --dim 1024 --repeats 9",
        ),
        interpreter.control,
        interpreter.CONTROL_GOALS,
    ),
    "beside": Section(
        ("bench beside --backend shm", "bench beside --backend tcp"),
        interpreter.beside,
        interpreter.BESIDE_GOALS,
    ),
    "tpot": Section(("bench tpot --rounds 5",), servers.running),
    "rate": Section(("bench rate",), interpreter.rates, interpreter.RATE_GOALS),
    "sessions": Section(("bench sessions",), interpreter.sessions),
    "idle": Section(("bench idle",), servers.idle),
    "unfetched": Section(
        ("bench unfetched --seconds 15 --against nixl",), servers.unfetched, servers.UNFETCHED_GOALS
    ),
    "convert": Section(
        ("bench convert", "bench convert --layout cpu-vec --no-torch"),
        transport.conversions,
        transport.CONVERSION_GOALS,
    ),
    "conversion-share": Section(
        ("bench handover --tokens 16384 --repeats 1 --backend tcp --target-dtype fp8_e4m3 --real-attention",),
        servers.converted_share,
        servers.SHARE_GOALS,
    ),
    "store": Section(("bench store", "bench store --page-bytes 65536 --pages 1024"), transport.stores),
    "link": Section(
        ("scripts.bench_link --gbit 1", "scripts.bench_link --gbit 10"), transport.links, transport.LINK_GOALS
    ),
    "devices": Section(
        (
            *(
                f"scripts.demo_domestic --vendor cambricon --to ascend --dma-gbytes-per-s {rate}"
                for rate in (0.7, 1.0, 1.5)
            ),
            *(
                f"scripts.demo_domestic --vendor {vendor} --backend pcie --target-dtype auto"
                for vendor in ("ascend", "cambricon", "hygon", "kunlunxin")
            ),
        ),
        devices.stages,
        devices.STAGE_GOALS,
    ),
    "telemetry": Section(
        ("bench telemetry --pairs 8 --rounds 21",), transport.counting, transport.COUNTING_GOALS
    ),
}


def shown(command: str) -> str:
    """As one types it."""
    if command.startswith(BENCH):
        return f'make bench ARGS="{command.removeprefix(BENCH)} --json"'
    return f'make shell ARGS="python -m {command} --json"'
