# SPDX-License-Identifier: Apache-2.0
"""Where snapshots come from: the engines of this user on this machine, or an exporter elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec

from sage_kv_connector.telemetry.recording.publishing import ENDING, check_private, directory
from sage_kv_connector.telemetry.recording.snapshot import Snapshot, decode

#: An engine that does not answer in this time is silent.
PATIENCE_S = 2.0
MOST_BYTES = 64 << 20
#: Engines that are asked at once.
AT_ONCE = 16


class Found(NamedTuple):
    """``silent``: process ids of engines that run and did not answer, with why."""

    snapshots: list[Snapshot]
    silent: dict[str, str] = {}  # noqa: RUF012 - a default that nobody changes


#: All engines of one place. Raises OSError or ValueError where nothing can be read.
Source = Callable[[], Found]


def local(where: Path | None = None) -> Found:
    """Engines of this user on this machine. Raises PermissionError for a directory that others can write to."""
    place = where or directory()
    try:
        check_private(place)
    except FileNotFoundError:
        return Found([])
    paths = sorted(place.glob(f"*{ENDING}"))
    found, silent = [], {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for path, answer in zip(paths, pool.map(_asked, paths), strict=True):
            if isinstance(answer, Snapshot):
                found.append(answer)
            elif answer:
                silent[path.name] = answer
    return Found(sorted(found, key=lambda one: (one.engine, one.rank, one.process)), silent)


def _asked(path: Path) -> Snapshot | str:
    """What an engine says, or why it says nothing; "" for one that is gone."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as engine:
            engine.settimeout(PATIENCE_S)
            engine.connect(str(path))
            data = bytearray()
            while part := engine.recv(1 << 20):
                data += part
                if len(data) > MOST_BYTES:
                    return f"more than {MOST_BYTES} bytes"
        return decode(bytes(data)) if data else "it said nothing"
    except (ConnectionRefusedError, FileNotFoundError):
        if not _runs(path.name.partition("-")[0]):
            with contextlib.suppress(OSError):
                path.unlink()
        return ""
    except (OSError, ValueError) as error:
        return str(error) or type(error).__name__


def _runs(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def exporter(url: str, token: str = "") -> Source:
    """The engines that an exporter shows at ``url``. Raises ValueError for what is no http address."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url is {url!r}, must begin with http:// or https://")

    def read() -> Found:
        request = urllib.request.Request(f"{url.rstrip('/')}/snapshot")
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=2 * PATIENCE_S) as answer:
                data = answer.read(MOST_BYTES + 1)
        except urllib.error.HTTPError as error:
            hint = ": it wants a token (--token-file, or the transport's secret)" if error.code == 401 else ""
            raise OSError(f"{url} answered {error.code}{hint}") from error
        except urllib.error.URLError as error:
            raise OSError(f"{url}: {error.reason}") from error
        return found_of(data)

    return read


def body_of(found: Found) -> bytes:
    """What ``/snapshot`` answers."""
    return msgspec.json.encode({"engines": found.snapshots, "silent": found.silent})


def found_of(data: bytes) -> Found:
    """The way back. Raises ValueError naming the field that is wrong."""
    try:
        body = json.loads(data)
        engines, silent = list(body["engines"]), dict(body["silent"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"not an exporter's /snapshot: {error!r}") from error
    return Found([decode(msgspec.json.encode(one)) for one in engines], silent)
