# SPDX-License-Identifier: Apache-2.0
"""A process that keeps KV for others until it is told to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from pydantic import ByteSize, TypeAdapter, ValidationError

from sage_kv_connector.config import KVTransportConfig, options_of_words
from sage_kv_connector.console import bytes_text
from sage_kv_connector.store.server import KVStore


def parse_capacity(text: str) -> int:
    """'8GiB', '512MB' or a number of bytes. Raises ValueError, also for more than this machine has."""
    try:
        capacity = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise ValueError(
            f"capacity is {text!r}, must be a number of bytes such as 8GiB or 8589934592"
        ) from error
    available = _available_bytes()
    if available is not None and capacity > available:
        raise ValueError(
            f"capacity is {text!r}, this machine has {bytes_text(available)} of memory available now"
        )
    return capacity


def run_store(capacity: int, host: str, port: int, options: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields what to print: once when it serves, once when it ended. Raises ValueError and OSError."""
    given = options_of_words(options, "--option")
    config = KVTransportConfig.load({**given, "host": host, "port": port}, "--option")
    store = KVStore(capacity, config)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        store.start()
        yield {"address": list(store.addresses), "capacity": capacity}
        ended.wait()
        yield {"address": list(store.addresses), "stats": msgspec.to_builtins(store.stats())}
    finally:
        store.close()


def _available_bytes() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None
