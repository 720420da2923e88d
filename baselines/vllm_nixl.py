# SPDX-License-Identifier: Apache-2.0
"""vLLM's NIXL connectors: decode pulls pages after prefill answered, or prefill pushes them.

Nothing had to be done to make them start here: ``kv_buffer_device=cpu`` is their own option. UCX is told the
transports: ``cma`` is what it takes on one node, ``tcp`` its sockets; between two hosts also the device, since it
would take any.
"""

from __future__ import annotations

from baselines.sides import Addresses, PeerPair, ServerSide, version_of

PULL, PUSH = "NixlPullConnector", "NixlPushConnector"
#: At a server's /metrics: bytes that it has read or written so far.
MOVED_BYTES = "vllm:nixl_bytes_transferred_sum"


def version() -> str:
    return version_of("nixl", "nixl-cu12")


def ucx(transport: str, between: Addresses) -> dict[str, str]:
    """What UCX is told, for agents of ours too. ``transport``: cma or tcp."""
    tls = {"cma": "posix,cma,tcp,self", "tcp": "tcp,self"}[transport]
    return {"UCX_TLS": tls} | ({"UCX_NET_DEVICES": between.device} if between.device else {})


def nixl(
    transport: str,
    side_channel_ports: tuple[int, int],
    connector: str = "NixlConnector",
    addresses: Addresses | None = None,
) -> PeerPair:
    """``transport``: cma or tcp; ``connector``: ``PULL``, ``PUSH``, or vLLM's own choice."""
    between = addresses or Addresses()
    config = {"kv_connector": connector, "kv_role": "kv_both", "kv_buffer_device": "cpu"}
    sides = [
        ServerSide(
            config,
            {
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port),
                "VLLM_NIXL_SIDE_CHANNEL_HOST": address,
                **ucx(transport, between),
            },
        )
        for port, address in zip(side_channel_ports, (between.prefill, between.decode), strict=True)
    ]
    return PeerPair(sides[0], sides[1])
