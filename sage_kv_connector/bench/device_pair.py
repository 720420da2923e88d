# SPDX-License-Identifier: Apache-2.0
"""Two processes with a KV cache on a device each, and hand-overs between them."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, NamedTuple

from sage_kv_connector.bench.device_cache import TIMEOUT_S, CacheShape, serve
from sage_kv_connector.contract.plan import TransferStats

ROLES = ("prefill", "decode")


class Case(NamedTuple):
    """``page``: tokens of a page of the decode side."""

    name: str
    backend: str
    page: int
    target_dtype: str


class HandOverFailed(RuntimeError):
    """A hand-over did not end well, or a process did not answer; the text says why."""


class DevicePair:
    """A context; both processes end with it. ``source``: the prefill side's cache. Raises HandOverFailed."""

    def __init__(self, vendor: str, source: CacheShape, case: Case, *, emulated: bool) -> None:
        config = {
            "backend": case.backend,
            "host": "127.0.0.1",
            "target_dtype": case.target_dtype,
            "deadline_s": TIMEOUT_S,
            "lease_s": TIMEOUT_S,
        }
        self._case = case
        self._number = 0
        context = multiprocessing.get_context("spawn")
        self._pipes: dict[str, Connection] = {}
        self._processes = []
        for role, shape in zip(ROLES, (source, source._replace(page=case.page)), strict=True):
            self._pipes[role], theirs = context.Pipe()
            arguments = (theirs, role, vendor, shape, source, config, emulated)
            self._processes.append(context.Process(target=serve, args=arguments, daemon=True))
            self._processes[-1].start()
            theirs.close()

    def __enter__(self) -> DevicePair:
        try:
            engine, addresses, self.runtime = self._answer("prefill")
            self._answer("decode")
        except HandOverFailed:
            self._kill()
            raise
        self._peer = (engine, 0, addresses)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            for pipe in self._pipes.values():
                pipe.send(("quit",))
            for process in self._processes:
                process.join(30)
        self._kill()

    def hand_over(self) -> tuple[TransferStats, float]:
        """Everything that the prefill side has; what the decode side says of it, and its seconds."""
        name = f"{self._case.name}-{self._number}"
        self._number += 1
        self.ask("prefill", "offer", name)
        begun = time.perf_counter()
        outcome = self.ask("decode", "fetch", self._peer, name)
        seconds = time.perf_counter() - begun
        if outcome.stats is None:
            raise HandOverFailed(f"{name}: {outcome.error}")
        return outcome.stats, seconds

    def ask(self, role: str, *order: Any) -> Any:
        self._pipes[role].send(order)
        return self._answer(role)

    def _answer(self, role: str) -> Any:
        try:
            if self._pipes[role].poll(TIMEOUT_S):
                return self._pipes[role].recv()
        except EOFError:
            raise HandOverFailed(f"{self._case.name}: the {role} side ended") from None
        raise HandOverFailed(f"{self._case.name}: the {role} side did not answer within {TIMEOUT_S:.0f} s")

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
