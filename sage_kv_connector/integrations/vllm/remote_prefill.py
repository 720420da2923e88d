# SPDX-License-Identifier: Apache-2.0
"""Where a decode request's KV comes from: what a client or a router put into its ``kv_transfer_params``."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from typing import Any

from sage_kv_connector.contract.bootstrap_room import metadata_transfer, pages_transfer, parse_room
from sage_kv_connector.contract.peer import bracket
from sage_kv_connector.contract.prompt import DIGEST_BYTES, UNBOUND, PromptDigest
from sage_kv_connector.engine import MAX_TRANSFER_ID
from sage_kv_connector.integrations.common.prefill_ranks import PrefillEngine, ranks_of
from sage_kv_connector.integrations.vllm.shared_request import (
    MAX_REQUEST_ID,
    prompt_number,
    request_transfer,
)

MAX_ENGINE_ID = 1024
#: Names, IPv4 and IPv6 addresses.
_HOST = re.compile(r"[0-9A-Za-z._:-]{1,253}")


@dataclass(frozen=True)
class RemotePrefill:
    """One transfer. ``prefill``: None when the bootstrap server at ``bootstrap`` must be asked.

    ``finished``: prefill is over, so the transfer must be known there. ``companions``: transfer ids of what
    is offered beside the pages and vLLM does not need (the metadata of a bootstrap room). ``prompt``: what
    prefill has, where it said so (of a request with several prompts the first one). ``engine_id``: which of the
    engines behind the bootstrap server, where that was said.
    """

    transfer_id: str
    prefill: PrefillEngine | None
    bootstrap: str
    finished: bool
    companions: tuple[str, ...] = ()
    prompt: PromptDigest = UNBOUND
    engine_id: str = ""

    @property
    def place(self) -> tuple[str, str]:
        """The bootstrap server to ask, and for which engine."""
        return self.bootstrap, self.engine_id

    @property
    def transfers(self) -> tuple[str, ...]:
        """All that is offered of it."""
        return (self.transfer_id, *self.companions)


def _in_room(pages: str) -> tuple[str, ...]:
    """The companions of a room's pages."""
    return (metadata_transfer(pages),)


def _prompt(given: object) -> PromptDigest:
    """``[tokens, hexadecimal digest]``, as prefill's answer has it; absent in those of other releases."""
    if given is None:
        return UNBOUND
    tokens, digest = given if isinstance(given, list | tuple) and len(given) == 2 else (0, "")
    if isinstance(tokens, int) and tokens > 0 and isinstance(digest, str):
        with contextlib.suppress(ValueError):
            raw = bytes.fromhex(digest)
            if len(raw) == DIGEST_BYTES:
                return PromptDigest(tokens, raw)
    raise ValueError(f"remote_prompt is {given!r}, must be [tokens, {2 * DIGEST_BYTES} hexadecimal digits]")


def _shown(value: object) -> str:
    """Of what a client sent: no more than a line."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _transfer_id(params: dict[str, Any]) -> str:
    given = params.get("transfer_id")
    if not isinstance(given, str) or not 0 < len(given) <= MAX_TRANSFER_ID:
        raise ValueError(f"transfer_id is {_shown(given)}, must be text of 1 to {MAX_TRANSFER_ID} characters")
    return given


def _named_transfer(params: dict[str, Any], request_id: str) -> str:
    """Of a router that asks both servers at once: an id of its own, or that of the request that both got."""
    if params.get("transfer_id") is not None:
        return _transfer_id(params)
    shared = params.get("remote_request_id")
    if not isinstance(shared, str) or not 0 < len(shared) <= MAX_REQUEST_ID:
        raise ValueError(
            f"remote_request_id is {_shown(shared)}, must be text of 1 to {MAX_REQUEST_ID} characters"
        )
    return request_transfer(shared, prompt_number(request_id))


def _own_bootstrap(params: dict[str, Any]) -> str:
    """Where that one engine's bootstrap server answers."""
    host, port = params.get("remote_host"), params.get("remote_port")
    if not isinstance(host, str) or not _HOST.fullmatch(host):
        raise ValueError(f"remote_host is {_shown(host)}, must be a host's name or address")
    if not isinstance(port, int) or isinstance(port, bool) or not 0 < port < 1 << 16:
        raise ValueError(f"remote_port is {_shown(port)}, allowed: 1 to 65535")
    return f"http://{bracket(host)}:{port}/own"


def parse_remote(params: dict[str, Any], request_id: str = "") -> RemotePrefill:
    """Read and bound a request's parameters. Raises ValueError naming the field that can't be used."""
    ranks = params.get("remote_ranks")
    named = None if ranks else parse_room(params, on_decode=True)
    if named is not None:
        pages = pages_transfer(named.room)
        return RemotePrefill(pages, None, named.url, False, _in_room(pages))
    engine_id = params.get("remote_engine_id")
    if not isinstance(engine_id, str) or not 0 < len(engine_id) <= MAX_ENGINE_ID:
        raise ValueError(
            f"remote_engine_id is {_shown(engine_id)}, must be the prefill engine's id, "
            f"text of 1 to {MAX_ENGINE_ID} characters"
        )
    bootstrap = params.get("remote_bootstrap_addr")
    if not ranks and not bootstrap and params.get("remote_host") is not None:
        return RemotePrefill(
            _named_transfer(params, request_id), None, _own_bootstrap(params), False, engine_id=engine_id
        )
    transfer_id = _transfer_id(params)
    if isinstance(ranks, dict) and ranks:
        try:
            by_rank = {int(rank): tuple(str(a) for a in addresses) for rank, addresses in ranks.items()}
        except (TypeError, ValueError):
            raise ValueError(f"remote_ranks is {ranks!r}, must map ranks to lists of addresses") from None
        stages = params.get("pp_size", 1)
        if not isinstance(stages, int):
            raise ValueError(f"pp_size is {stages!r}, must be a number of pipeline stages")
        node = str(params.get("remote_node", ""))
        prefill = PrefillEngine(ranks_of(engine_id, by_rank, node), stages)
        companions = _in_room(transfer_id) if params.get("in_room") is True else ()
        return RemotePrefill(transfer_id, prefill, "", True, companions, _prompt(params.get("remote_prompt")))
    if isinstance(bootstrap, str) and bootstrap.startswith(("http://", "https://")):
        return RemotePrefill(transfer_id, None, bootstrap.rstrip("/"), False, engine_id=engine_id)
    raise ValueError(
        f"remote_ranks is {ranks!r} and remote_bootstrap_addr {bootstrap!r}: one must say where prefill is"
    )
