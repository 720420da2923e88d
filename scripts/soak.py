# SPDX-License-Identifier: Apache-2.0
"""Many requests through a pair of real vLLM servers while links break and servers stop, die and come back.

    make soak ARGS="[--requests 10000] [--clients 8] [--seed 0] [--json] [--logs FOLDER]"

Prompts of mixed length are handed over in both orders of dispatch; some clients hang up. Every answer of a living
server must have the tokens of a lone one, and no client may get an error that a lone server would not give: one while
the server that it asked was dead counts apart. Afterwards pools, descriptors, threads and /dev/shm are as before.
JSON: requests, right, wrong, errors (with their texts), aborted, while_dead, faults by kind, held, rss_mib, seconds.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from integration_tests.cluster import PREFILL_PARAMS, holdings, new_prompt, shared_memory_files
from integration_tests.fault_servers import HELD_S, PATIENCE_S
from integration_tests.fault_vllm import VllmServers, vllm_servers
from integration_tests.request_pair import Pair
from sage_kv_connector.launch.process import Process, ServerError, unwind_on_sigterm
from sage_kv_connector.launch.vllm import complete

LENGTHS = (16, 40, 130, 300, 700, 1500)
PROMPTS = 120
TOKENS = 6
#: Seconds between two faults, and of a stop.
PAUSES_S, STOPS_S = (1.0, 4.0), (0.3, 2.5)
#: Chances of each fault; killing takes a server away for half a minute.
FAULTS = {"cut": 40, "forget": 15, "stop_prefill": 15, "stop_decode": 15, "kill_prefill": 1, "kill_decode": 1}
#: Memory is looked at so many times on the way.
LOOKS = 8
#: Descriptors and threads that come and go with HTTP connections.
SPARE = 12


class Soak:
    """One run; counts what clients got."""

    def __init__(self, servers: VllmServers, given: argparse.Namespace) -> None:
        self.servers, self.given = servers, given
        self.counts: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.errors: list[str] = []
        self._rng = random.Random(given.seed)
        self._over = threading.Event()
        self._lock = threading.Lock()
        #: When each server was dead, last.
        self._dead: dict[str, tuple[float, float]] = {}
        self.memory: list[dict[str, float]] = []
        self.prompts = [new_prompt(self._rng.choice(LENGTHS), given.seed * 1000 + i) for i in range(PROMPTS)]
        self.expected = [
            complete(servers.alone.url, prompt, max_tokens=TOKENS).token_ids for prompt in self.prompts
        ]

    def run(self) -> None:
        harm = threading.Thread(target=self._harm)
        harm.start()
        begun = shown = time.monotonic()
        try:
            with ThreadPoolExecutor(self.given.clients) as clients:
                futures = [clients.submit(self._request, i) for i in range(self.given.requests)]
                for number, future in enumerate(futures, 1):
                    future.result()
                    if number % max(1, self.given.requests // LOOKS) == 0:
                        self.memory.append(_memory(self.servers))
                    if time.monotonic() - shown > 20:
                        shown = time.monotonic()
                        left = (self.given.requests - number) * (shown - begun) / number
                        print(f"{number} requests, {dict(self.counts)}, {left:.0f} s left", file=sys.stderr)
        finally:
            self._over.set()
            harm.join()

    def _request(self, number: int) -> None:
        rng = random.Random(self.given.seed * 1_000_003 + number)
        index, hangs_up, at_once = rng.randrange(PROMPTS), rng.random() < 0.08, rng.random() < 0.4
        while any(died and not back for died, back in list(self._dead.values())):
            time.sleep(0.1)  # as a router that asks for their health
        begun = time.monotonic()
        asked = "prefill"
        try:
            params, prefill = self._prefill(self.prompts[index], at_once)
            asked = "decode"
            timeout_s = rng.uniform(0.01, 0.4) if hangs_up else PATIENCE_S
            url, prompt = self.servers.decode.url, self.prompts[index]
            answer = complete(
                url, prompt, max_tokens=TOKENS, kv_transfer_params=params, timeout_s=timeout_s
            ).token_ids
            if prefill is not None:
                prefill.join()
        except (ServerError, OSError, http.client.HTTPException) as error:
            self._note(asked, begun, hangs_up and asked == "decode", str(error))
            return
        with self._lock:
            self.counts["right" if answer == self.expected[index] else "wrong"] += 1

    def _prefill(self, prompt: list[int], at_once: bool) -> tuple[dict[str, Any], threading.Thread | None]:
        url = self.servers.prefill.url
        if at_once:
            servers = self.servers
            params, for_decode = Pair(
                servers.prefill, servers.decode, servers.alone, servers.bootstrap
            ).both()
            thread = threading.Thread(target=self._quietly, args=(url, prompt, params))
            thread.start()
            return for_decode, thread
        first = complete(
            url, prompt, max_tokens=1, kv_transfer_params=PREFILL_PARAMS, stream=False, timeout_s=PATIENCE_S
        )
        assert first.kv_transfer_params is not None
        return first.kv_transfer_params, None

    def _quietly(self, url: str, prompt: list[int], params: dict[str, Any]) -> None:
        """The router's business: decode answers without prefill, too."""
        try:
            complete(url, prompt, max_tokens=1, kv_transfer_params=params, stream=False, timeout_s=PATIENCE_S)
        except ServerError:
            pass

    def _note(self, asked: str, begun: float, hung_up: bool, text: str) -> None:
        died, came_back = self._dead.get(asked, (0.0, 0.0))
        was_dead = came_back > begun or died > begun or (died and not came_back)
        with self._lock:
            if hung_up:
                self.counts["aborted"] += 1
            elif was_dead:
                self.counts["while_dead"] += 1
            else:
                self.counts["errors"] += 1
                self.errors.append(f"{asked}: {text}"[:300])

    # -- what goes wrong meanwhile

    def _harm(self) -> None:
        kinds, weights = list(FAULTS), list(FAULTS.values())
        while not self._over.wait(self._rng.uniform(*PAUSES_S)):
            kind = self._rng.choices(kinds, weights)[0]
            self.faults[kind] += 1
            role = kind.partition("_")[2]
            if kind == "cut":
                self.servers.proxies[0].cut()
            elif kind == "forget":
                self.servers.proxies[0].forget()
            elif kind.startswith("stop"):
                self._stop(getattr(self.servers, role))
            else:
                self._kill(role)

    def _stop(self, server: Process) -> None:
        for how in (signal.SIGSTOP, signal.SIGCONT):
            for pid in server.pids():
                try:
                    os.kill(pid, how)
                except OSError:
                    continue
            if how is signal.SIGSTOP:
                self._over.wait(self._rng.uniform(*STOPS_S))

    def _kill(self, role: str) -> None:
        server = getattr(self.servers, role)
        self._dead[role] = (time.monotonic(), 0.0)
        server.stop(signal.SIGKILL)
        server.start()
        server.wait_until_healthy()
        self._dead[role] = (self._dead[role][0], time.monotonic())


def _memory(servers: VllmServers) -> dict[str, float]:
    """Resident memory of each server, in MiB."""
    found = {}
    for role in ("prefill", "decode"):
        kib = 0
        for pid in getattr(servers, role).pids():
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue
            kib += sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
        found[role] = round(kib / 1024, 1)
    return found


def _held(servers: VllmServers, before: dict[str, dict[str, int]], files: set[str]) -> dict[str, float]:
    until = time.monotonic() + HELD_S
    while True:
        held = {name: value for name, value in servers.settle().items() if value}
        for role, known in before.items():
            now = holdings(getattr(servers, role))
            held |= {
                f"{role}.{name}": now[name] - known[name] for name in known if now[name] > known[name] + SPARE
            }
        if more := shared_memory_files() - files:
            held["/dev/shm"] = len(more)
        if not held or time.monotonic() > until:
            return held
        time.sleep(1.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    parser.add_argument("--logs", type=Path, help="a folder; the servers' logs and the model stay there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = given.logs or Path(folder)
        scratch.mkdir(parents=True, exist_ok=True)
        with vllm_servers(scratch) as servers:
            servers.audit.unlink()  # nobody reads it
            soak = Soak(servers, given)
            before = {role: holdings(getattr(servers, role)) for role in ("prefill", "decode")}
            memory, files = _memory(servers), shared_memory_files()
            begun = time.monotonic()
            soak.run()
            seconds = time.monotonic() - begun
            # A server that was started again has files of its own.
            killed = any(kind.startswith("kill") for kind in soak.faults)
            held = _held(servers, before, shared_memory_files() if killed else files)
            found = {
                "requests": given.requests,
                **{name: soak.counts[name] for name in ("right", "wrong", "errors", "aborted", "while_dead")},
                "error_texts": dict(Counter(soak.errors).most_common(20)),
                "faults": dict(soak.faults),
                "held": held,
                "rss_mib": {"before": memory, "during": soak.memory, "after": _memory(servers)},
                "seconds": round(seconds, 1),
                "requests_per_second": round(given.requests / seconds, 1),
            }
    if given.json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{name}: {value}" for name, value in found.items()))
    return 1 if found["wrong"] or found["errors"] or held else 0


if __name__ == "__main__":
    unwind_on_sigterm()
    sys.exit(main())
