# SPDX-License-Identifier: Apache-2.0
"""Runs a suite: within a round arms take turns, in an order drawn anew for each; what is done is kept at once."""

from __future__ import annotations

import random
import re
import signal
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from sage_kv_connector.bench.ab.arms import ARMS, started
from sage_kv_connector.bench.ab.drive import drive, judge
from sage_kv_connector.bench.ab.kept import Kept, Left
from sage_kv_connector.bench.ab.links import Hosts, iperf, linked
from sage_kv_connector.bench.ab.loads import made
from sage_kv_connector.bench.ab.spent import spent
from sage_kv_connector.bench.ab.suites import Case, Group, Suite
from sage_kv_connector.bench.server_pairs import ServerPair, random_prompt, servers_env, why_missing
from sage_kv_connector.console import progress
from sage_kv_connector.launch.process import ServerError
from sage_kv_connector.launch.tiny_model import SHAPES, build
from sage_kv_connector.launch.vllm import VllmOptions

SHAPE = "wide"
#: Answers of one turn that are judged: as many as the server that judges computes in a while, within bounds.
JUDGED_TOKENS, JUDGED = 65536, range(2, 5)
#: A context holds the prompt, its answer, and what a conversation adds.
ROOM = 4096
#: Of memory, that a server takes beside its KV cache.
SERVER_BYTES = 3 << 29

_One = TypeVar("_One")


def run_suite(suite: Suite, seed: str, kept: Kept) -> dict[str, str]:
    """Does what ``kept`` lacks; returns why a peer is missing. Raises ServerError where another arm does not start."""
    missing: dict[str, str] = {}
    left = Left(sum(len(_lacking(group, suite, arm, kept)) for group in suite.groups for arm in suite.arms))
    for group in suite.groups:
        if not any(_lacking(group, suite, arm, kept) for arm in suite.arms):
            continue
        with (
            linked(group.link) as hosts,
            tempfile.TemporaryDirectory(prefix="sage-kvt-ab-") as name,
        ):
            if hosts is not None:
                kept.add_link(group.link, iperf(hosts)._asdict())
            _Turns(group, suite, seed, kept, hosts, Path(name), missing, left).run()
    return missing


def _lacking(group: Group, suite: Suite, arm: str, kept: Kept) -> list[tuple[Case, int]]:
    """Cases of an arm that are to be done, and in which round."""
    return [
        (case, number)
        for number in range(suite.rounds)
        for case in group.cases()
        if _is_lacking(case, arm, number, kept)
    ]


def _is_lacking(case: Case, arm: str, number: int, kept: Kept) -> bool:
    return case.dispatch in ARMS[arm].dispatches and not kept.has(case, arm, number)


def _judged(tokens: int) -> int:
    return min(JUDGED[-1], max(JUDGED[0], JUDGED_TOKENS // tokens))


def _available_bytes() -> int:
    (kib,) = re.findall(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(kib) << 10


class _Turns:
    """Of one group of cases."""

    def __init__(
        self,
        group: Group,
        suite: Suite,
        seed: str,
        kept: Kept,
        hosts: Hosts | None,
        directory: Path,
        missing: dict[str, str],
        left: Left,
    ) -> None:
        self._group, self._suite, self._seed, self._kept, self._hosts = group, suite, seed, kept, hosts
        self._missing, self._left = missing, left
        self._given_up: set[str] = set()
        context = max(group.tokens) + ROOM
        model = build(directory, SHAPE)
        self._options = VllmOptions(model, directory, context, group.kv_gib, env=servers_env())
        self._order = random.Random(f"{seed} {group.link} {group.tokens}")

    def run(self) -> None:
        # All arms' servers stay up, and those not measured are stopped; where they don't fit, each turn starts its own.
        if len(self._suite.arms) * 2 * (SERVER_BYTES + (self._group.kv_gib << 30)) < _available_bytes():
            with ExitStack() as stack:
                pairs = [pair for arm in self._suite.arms for pair in self._started(arm, stack)]
                for number in range(self._suite.rounds):
                    for case in self._group.cases():
                        for pair in self._shuffled(pairs):
                            self._turn(pair, case, number)
        else:
            for number in range(self._suite.rounds):
                for arm in self._shuffled(self._suite.arms):
                    with ExitStack() as stack:
                        for pair in self._started(arm, stack, number):
                            for case in self._group.cases():
                                self._turn(pair, case, number)

    def _shuffled(self, of: Sequence[_One]) -> list[_One]:
        return self._order.sample(of, len(of))

    def _started(self, arm: str, stack: ExitStack, number: int | None = None) -> list[ServerPair]:
        """The arm's servers, stopped until their turn; none where nothing is to be done, or a peer does not start."""
        lacking = _lacking(self._group, self._suite, arm, self._kept)
        todo = [one for one in lacking if number is None or one[1] == number]
        if not todo or arm in self._given_up:
            return []
        try:
            pair = started(arm, self._options, self._hosts, stack)
            pair.sequential(random_prompt(max(self._group.tokens)))  # touches caches that were never written
        except ServerError as error:
            if not ARMS[arm].is_peer:
                raise
            self._give_up(arm, f"does not start: {why_missing(arm.split('-')[0], error)}")
            return []
        stack.callback(pair.signal, signal.SIGCONT)
        pair.signal(signal.SIGSTOP)
        return [pair]

    def _give_up(self, arm: str, why: str) -> None:
        """For the rest of this group."""
        self._given_up.add(arm)
        tokens = ", ".join(map(str, self._group.tokens))
        self._missing.setdefault(f"{arm}, {self._group.link}, {tokens} tokens", why)
        progress.print(f"{arm} is left out from here: {why}", markup=False)

    def _turn(self, pair: ServerPair, case: Case, number: int) -> None:
        arm = pair.name
        if arm in self._given_up or not _is_lacking(case, arm, number, self._kept):
            return
        seed = f"{self._seed} {number} {case.dispatch}"  # no case meets what another left in a prefix cache
        queues = made(case.load, case.tokens, case.requests, seed, self._requests_s(case.tokens))
        with pair.turn():
            with spent(pair, self._hosts) as taken:
                done = drive(pair, queues, case.dispatch)
            failed = [one["error"] for one in done if "error" in one]
            try:
                judge(pair, queues, done, _judged(case.tokens), random.Random(seed))
            except ServerError as error:
                failed.append(str(error))
            if failed and ARMS[arm].is_peer:  # it may hold pages for good, and block the next request
                self._give_up(
                    arm, f"failed {len(failed)} of {len(done)} requests of {case.name}: {failed[0]}"
                )
        self._kept.add_turn(case, arm, number, {"done": done, "spent": asdict(taken)})
        first = sorted(one["prefill_s"] + one["ttft_s"] for one in done if "error" not in one)
        said = f"first tokens after {first[len(first) // 2]:.2f} s" if first else "no answer"
        progress.print(
            f"round {number + 1} of {self._suite.rounds}, {case.name}, {arm}: {said}; {self._left.after()}",
            markup=False,
        )

    def _requests_s(self, tokens: int) -> float | None:
        """Such prompts that the link carries a second, as KV in bf16."""
        if self._hosts is None:
            return None
        payload = self._kept.links[self._group.link]["payload_bytes_s"]
        return payload / (tokens * SHAPES[SHAPE].kv_bytes_per_token)
