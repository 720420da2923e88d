# SPDX-License-Identifier: Apache-2.0
"""Why a transfer moved nothing: a code, the stage it had come to, the peer, the bytes, and what was said.

Every code has its meaning, causes and remedy in ``failure_kinds``. Codes travel in ``Failed`` messages; one that
a peer's newer release sends and this one does not know is ``other``.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from traceback import extract_tb
from typing import NamedTuple

MAX_EXCERPT = 256


class Stage(StrEnum):
    """How far a transfer had come."""

    RESOLVE = "resolve"  #: decode finds out who holds the KV
    CONNECT = "connect"  #: addresses are dialled, secrets and versions compared
    AGREE = "agree"  #: caches, weights and prompts are compared
    HOLD = "hold"  #: prefill's pages are final and wait for decode
    WAIT = "wait"  #: decode asked for the pages and waits for them
    MOVE = "move"  #: bytes cross
    CONVERT = "convert"  #: they are encoded or decoded


class Code(StrEnum):
    """What ended a transfer."""

    BOOTSTRAP = "bootstrap"
    PARALLEL_SIZES = "parallel_sizes"
    UNREACHABLE = "unreachable"
    BAD_SECRET = "bad_secret"
    SECURITY = "security"
    RELAYED = "relayed"
    VERSION = "version"
    OTHER_ENGINE = "other_engine"
    PROTOCOL = "protocol"
    SCHEMA = "schema"
    WEIGHTS = "weights"
    PROMPT = "prompt"
    TOKENS = "tokens"
    BAD_SELECTION = "bad_selection"
    UNKNOWN_TRANSFER = "unknown_transfer"
    DUPLICATE = "duplicate"
    EXPIRED = "expired"
    BUSY = "busy"
    DECLINED = "declined"
    WITHDRAWN = "withdrawn"
    CANCELLED = "cancelled"
    SHUTTING_DOWN = "shutting_down"
    DEADLINE = "deadline"
    SESSION_LOST = "session_lost"
    MEMORY = "memory"
    POST = "post"
    SEND_FAILED = "send_failed"
    CHECKSUM = "checksum"
    FORGED = "forged"
    LANDING = "landing"
    CONVERSION = "conversion"
    FIRST_TOKEN = "first_token"
    INTERNAL = "internal"
    OTHER = "other"


class Reason(NamedTuple):
    """A code, and what is to be said of this case."""

    code: Code
    detail: str

    def __str__(self) -> str:
        """``reason_of_text`` is the way back."""
        return f"{self.code}: {self.detail}"


def fault(error: Exception) -> Reason:
    """Of a fault that nobody thought of: ours, a library's, a vendor's. Says where it was raised."""
    raised = extract_tb(error.__traceback__)[-1:]
    where = "".join(f" ({Path(frame.filename).name}:{frame.lineno})" for frame in raised)
    return Reason(Code.INTERNAL, f"{type(error).__name__}: {error}{where}")


class Failure(NamedTuple):
    """A transfer that moved nothing of use.

    ``nbytes``: so many were to move, 0 where that was not known yet. ``aborted``: it ended because somebody on
    this side wanted it so, or because nobody wants it any more.
    """

    code: Code
    stage: Stage
    detail: str
    peer: str = ""
    nbytes: int = 0
    aborted: bool = False

    @property
    def reason(self) -> Reason:
        return Reason(self.code, self.detail)

    @property
    def facts(self) -> str:
        """All but the detail, for a log line."""
        peer = f", peer {self.peer}" if self.peer else ""
        nbytes = f", {self.nbytes} bytes" if self.nbytes else ""
        return f"code {self.code}, stage {self.stage}{peer}{nbytes}"


def printable(text: str) -> str:
    """What a peer or a client said, so that it can't break a log line."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def excerpt(text: object) -> str:
    """As ``printable``, of at most ``MAX_EXCERPT`` characters: what an error repeats of a peer's words."""
    whole = str(text)
    return printable(whole[:MAX_EXCERPT]) + ("…" if len(whole) > MAX_EXCERPT else "")


def reason_of_peer(code: str, detail: str) -> Reason:
    """What a peer said; neither is trusted."""
    try:
        known = Code(code)
    except ValueError:
        return Reason(Code.OTHER, f"told by the peer ({printable(code[:64])}): {printable(detail)}")
    return Reason(known, f"told by the peer: {printable(detail)}")


def reason_of_text(text: str) -> Reason:
    """From ``str`` of a reason, or from anything else that is said."""
    head, _, detail = text.partition(": ")
    try:
        return Reason(Code(head), detail)
    except ValueError:
        return Reason(Code.OTHER, text)
