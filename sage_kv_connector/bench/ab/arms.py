# SPDX-License-Identifier: Apache-2.0
"""The contenders: what each one's servers are started with on one node and across a link, and how they are asked."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sage_kv_connector.bench.ab.links import DEVICE, Hosts
from sage_kv_connector.bench.ab.suites import DISPATCHES
from sage_kv_connector.bench.server_pairs import Place, ServerPair, pair_of, taken
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.launch.process import running
from sage_kv_connector.launch.vllm import VllmOptions, complete

if TYPE_CHECKING:
    from baselines.sides import Addresses, PeerPair

OURS = "ours"
#: Of one server alone: nothing is handed over.
ALONE = "alone"


class _Alone(ServerPair):
    """Decode computes everything itself; prefill is there to judge answers."""

    def sequential(self, prompt: list[int], max_tokens: int = 2) -> dict[str, Any]:
        answer = complete(self.decode.url, prompt, max_tokens=max_tokens)
        return taken(0.0, answer.ttft_s, answer)


@dataclass(frozen=True)
class Arm:
    """``lossless``: decode's answers must be those of one server. ``dispatches``: how a router may send requests."""

    sides: Callable[[Addresses], PeerPair]
    lossless: bool = True
    dispatches: tuple[str, ...] = ("sequential",)
    pair: type[ServerPair] = ServerPair
    is_peer: bool = False


def _ours(dtype: str, library: str = "") -> Callable[[Addresses], PeerPair]:
    """``library``: the one that reads the pages, which it does of connections that are not protected."""

    def sides(between: Addresses) -> PeerPair:
        from baselines.sides import PeerPair, ServerSide
        from baselines.vllm_nixl import ucx

        backend, bootstrap = library or ("tcp" if between.device else "shm"), free_port()
        more = ",security=none" if library else ""
        env = ucx(_transport(between), between) if library == "nixl" else {}
        prefill, decode = (
            f"sage_kvt:backend={backend},host={host},target_dtype={dtype}{more}"
            for host in (between.prefill, between.decode)
        )
        return PeerPair(
            ServerSide(f"{prefill},bootstrap_port={bootstrap}", env | _host(between, between.prefill)),
            ServerSide(decode, env | _host(between, between.decode)),
            bootstrap,
        )

    return sides


def _transport(between: Addresses) -> str:
    return "tcp" if between.device else "cma"


def _host(between: Addresses, address: str) -> dict[str, str]:
    """vLLM itself finds no address in a namespace that has no way out."""
    return {"VLLM_HOST_IP": address} if between.device else {}


def _nixl(between: Addresses, connector: str) -> PeerPair:
    from baselines.vllm_nixl import nixl

    return nixl(_transport(between), (free_port(), free_port()), connector, between)


def _nixl_pull(between: Addresses) -> PeerPair:
    from baselines.vllm_nixl import PULL

    return _nixl(between, PULL)


def _nixl_push(between: Addresses) -> PeerPair:
    from baselines.vllm_nixl import PUSH

    return _nixl(between, PUSH)


def _mooncake(between: Addresses) -> PeerPair:
    from baselines.vllm_mooncake import mooncake

    return mooncake(free_port(), between)


def _alone(between: Addresses) -> PeerPair:
    from baselines.sides import PeerPair, ServerSide

    return PeerPair(
        ServerSide(None, _host(between, between.prefill)), ServerSide(None, _host(between, between.decode))
    )


ARMS = {
    "ours-bf16": Arm(_ours("auto"), dispatches=DISPATCHES),
    "ours-fp8": Arm(_ours("fp8_e4m3"), lossless=False, dispatches=DISPATCHES),
    "ours-int4": Arm(_ours("int4"), lossless=False, dispatches=DISPATCHES),
    "ours-nixl": Arm(_ours("auto", "nixl"), dispatches=DISPATCHES),
    "ours-mooncake": Arm(_ours("auto", "mooncake"), dispatches=DISPATCHES),
    "nixl-pull": Arm(_nixl_pull, is_peer=True),
    "nixl-push": Arm(_nixl_push, is_peer=True),
    "mooncake": Arm(_mooncake, dispatches=DISPATCHES, is_peer=True),
    # Its decode's tokens are stubbed with another's prefill in the same step, so they are no one server's answer.
    ALONE: Arm(_alone, lossless=False, pair=_Alone),
}


def versions() -> dict[str, str]:
    """Of the engine and the peers, as installed."""
    from baselines import vllm_mooncake, vllm_nixl
    from baselines.sides import version_of

    return {
        "engine": version_of("vllm"),
        "nixl": vllm_nixl.version(),
        "mooncake": vllm_mooncake.version(),
        "ours": version_of("sage-kv-connector"),
    }


def started(name: str, options: VllmOptions, hosts: Hosts | None, stack: ExitStack) -> ServerPair:
    """The arm's servers, running until ``stack`` ends. Raises ServerError with the tail of a log."""
    from baselines.sides import Addresses

    arm = ARMS[name]
    if hosts is None:
        between, places = Addresses(), (Place(), Place())
    else:
        between = Addresses(hosts.prefill.address, hosts.decode.address, DEVICE)
        places = (
            Place(hosts.prefill.address, hosts.prefill.enter),
            Place(hosts.decode.address, hosts.decode.enter),
        )
    pair = pair_of(name, arm.sides(between), options, places, arm.pair)
    stack.enter_context(running(pair.prefill, pair.decode))
    return pair
