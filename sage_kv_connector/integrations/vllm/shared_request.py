# SPDX-License-Identifier: Apache-2.0
"""The request id that a router gives to prefill and decode alike, found again in vLLM's own request ids.

vLLM makes its ids of the header ``X-Request-Id``: a kind before it, behind it the prompt's number where a request may
have several, and random digits. Samples (``n``) have their number before all that. So header and prompt's number are
what a prefill and a decode request have in common; samples share both, and a prompt's digest decides in the end.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from sage_kv_connector.engine import MAX_TRANSFER_ID

#: Longest request id that is taken from a client or a router, in characters.
MAX_REQUEST_ID = 1024
#: Keeps these names apart from others: a room's transfers have no digest that would tell prompts apart.
_PREFIX = "request-"
_OWN_IDS = re.compile(
    r"(?:[0-9]{1,6}_)?(?:"
    r"cmpl-(?P<completion>.+)-(?P<prompt>[0-9]{1,9})|"
    r"chatcmpl-(?P<chat>.+?)(?:_(?P<conversation>[0-9]{1,6}))?|"
    r"generate-tokens-(?P<tokens>.+))",
    re.DOTALL,
)
_RANDOM = re.compile(r"-[0-9a-f]{8}\Z")


class _Made(NamedTuple):
    """What an id of vLLM's is made of."""

    shared: str
    prompt: int


def request_transfer(shared: str, prompt: int = 0) -> str:
    """What the transfer of one prompt of a router's request is named. Of 1 to MAX_TRANSFER_ID characters."""
    named = f"{_PREFIX}{shared}#{prompt}"
    if len(named) <= MAX_TRANSFER_ID:
        return named
    return f"{_PREFIX}{hashlib.sha256(named.encode(errors='surrogatepass')).hexdigest()}"


def shared_transfer(request_id: str) -> str:
    """The same of a request id of vLLM's; "" where it is not made of a router's, or in another way than is known.

    Where vLLM's ids have no random digits (``VLLM_DISABLE_REQUEST_ID_RANDOMIZATION``) and the router's end as if they
    had, it is another name. Then the prompt's digest alone brings both sides together.
    """
    made = _parse(request_id)
    return "" if made is None else request_transfer(*made)


def names_of(request_id: str, params: Mapping[str, Any]) -> tuple[str, str]:
    """The transfer id that a router gave a prefill in its parameters, and ``shared_transfer``; "" for either."""
    given = params.get("transfer_id")
    good = isinstance(given, str) and 0 < len(given) <= MAX_TRANSFER_ID
    return str(given) if good else "", shared_transfer(request_id)


def prompt_number(request_id: str) -> int:
    """Which of its request's prompts a request of vLLM's is; 0 where there is one, or that can't be told."""
    made = _parse(request_id)
    return 0 if made is None else made.prompt


def _parse(request_id: str) -> _Made | None:
    found = _OWN_IDS.fullmatch(_RANDOM.sub("", request_id[: 2 * MAX_REQUEST_ID]))
    if found is None:
        return None
    shared = found["completion"] or found["chat"] or found["tokens"] or ""
    number = int(found["prompt"] or found["conversation"] or 0)
    return _Made(shared, number) if 0 < len(shared) <= MAX_REQUEST_ID else None
