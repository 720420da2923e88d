# SPDX-License-Identifier: Apache-2.0
"""A server as a child process: started, waited for, stopped; nothing is left behind."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sage_kv_connector.console import progress

START_TIMEOUT_S = 300.0
LOG_TAIL_LINES = 30


def unwind_on_sigterm() -> None:
    """SIGTERM unwinds this program like Ctrl-C from now on, so that servers that it started are stopped with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


class ServerError(RuntimeError):
    """A process did not start or ended; the message holds the tail of its log."""


@dataclass
class Process:
    """A child in a process group of its own, its log in a file."""

    name: str
    command: Sequence[str]
    port: int
    log: Path
    env: dict[str, str] = field(default_factory=dict)
    cores: str | None = None
    popen: subprocess.Popen[bytes] | None = None
    health: str = "/health"
    host: str = "127.0.0.1"
    prefix: Sequence[str] = ()  #: of the command, as one that takes it into another network namespace

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def start(self) -> None:
        command = list(self.command)
        if self.cores is not None and shutil.which("taskset"):
            command = ["taskset", "-c", self.cores, *command]
        command = [*self.prefix, *command]
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **self.env},
                start_new_session=True,
            )

    def wait_until_healthy(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Raises ServerError when it ends, or is not healthy in time."""
        until = time.monotonic() + timeout_s
        while True:
            if self.popen is None or self.popen.poll() is not None:
                raise ServerError(f"{self.name} ended while it started; its log ends with\n{self.log_tail()}")
            if _answers(self.host, self.port, self.health):
                return
            if time.monotonic() > until:
                raise ServerError(f"{self.name} was not healthy after {timeout_s:.0f} s:\n{self.log_tail()}")
            time.sleep(0.25)

    def stop(self, how: int = signal.SIGTERM, timeout_s: float = 20.0) -> None:
        """End the whole group; SIGKILL what is left after ``timeout_s``."""
        if self.popen is None:
            return
        _signal_group(self.popen.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(timeout_s)
        _signal_group(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        self.popen = None

    def log_tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def pids(self) -> list[int]:
        """Every process of the group."""
        if self.popen is None:
            return []
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError, ValueError):
                    stat = (entry / "stat").read_text()
                    if int(stat.rpartition(")")[2].split()[2]) == self.popen.pid:
                        found.append(int(entry.name))
        return found


def _signal_group(pid: int, how: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, how)


def _answers(host: str, port: int, path: str) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@contextlib.contextmanager
def running(*processes: Process) -> Iterator[None]:
    """Start all, wait for all, and stop all whatever happens."""
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.wait_until_healthy()
            progress.print(f"{process.name} is up on port {process.port}")
        yield
    finally:
        for process in processes:
            process.stop()


def core_halves() -> tuple[str | None, str | None]:
    """One half of the cores for each server, so that they don't slow each other; none on a single core."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return None, None
    middle = len(cores) // 2
    return ",".join(map(str, cores[:middle])), ",".join(map(str, cores[middle:]))


def console_script(name: str) -> str:
    """A console script of this environment."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ServerError(f"{name} is not installed in this environment (see `sage-kvt doctor`)")
    return found
