# SPDX-License-Identifier: Apache-2.0
"""Whose turn it is among threads that send to one rank, or receive from it, under one tag."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from sage_kv_connector.engine import EngineCore

MAX_TAG = 128
#: Pairs and tags whose messages are counted; of more than these the longest unused are forgotten, on both sides alike.
MAX_TURNS = 1 << 16


class Turn:
    """Messages between two ranks: which one is next, and what the receiver still offers about the last."""

    def __init__(self) -> None:
        self.tickets = 0  #: calls so far
        self.served = 0  #: calls that ended
        self.number = 0  #: of the next message
        self.verdict = ""

    def keep_verdict(self, core: EngineCore, name: str) -> None:
        """The sender who offered this message has read the verdict on the one before."""
        if self.verdict:
            core.withdraw([self.verdict], "a later message arrived", wait=False)
        self.verdict = name

    def try_again(self, core: EngineCore, name: str) -> None:
        """The sender must not read the verdict on a try before this one."""
        if self.verdict == name:
            core.withdraw([name], "the message is tried again")
            self.verdict = ""


class Turns:
    """All turns of one rank."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._turns: OrderedDict[tuple[str, int, str], Turn] = OrderedDict()

    @contextmanager
    def take(self, verb: str, rank: int, tag: str) -> Iterator[Turn]:
        """One message of a pair and tag at a time, in the order of the calls. Raises ValueError for a long tag."""
        if len(tag) > MAX_TAG:
            raise ValueError(f"tag has {len(tag)} characters; allowed: up to {MAX_TAG}")
        key = (verb, rank, tag)
        with self._changed:
            turn = self._turns.setdefault(key, Turn())
            self._turns.move_to_end(key)
            ticket = turn.tickets
            turn.tickets += 1
            self._changed.wait_for(lambda: turn.served == ticket)
        try:
            yield turn
        finally:
            with self._changed:
                turn.served += 1
                self._forget_old()
                self._changed.notify_all()

    def _forget_old(self) -> None:
        """Tags are many, and each is used once or seldom.

        A tag that is used again counts on: else its next message had the name of the one before, whose verdict
        may still be on offer.
        """
        while len(self._turns) > MAX_TURNS:
            key, oldest = next(iter(self._turns.items()))
            if not key[2] or oldest.served != oldest.tickets:
                self._turns.move_to_end(key)
                return
            del self._turns[key]
