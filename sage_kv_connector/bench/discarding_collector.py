# SPDX-License-Identifier: Apache-2.0
"""A process that takes OTLP over HTTP and throws it away, so that sending spans can be measured at the sender."""

from __future__ import annotations

import multiprocessing
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing.connection import Connection
from typing import Self


class DiscardingCollector:
    """A context manager. ``endpoint``: where it listens, on loopback."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        if not ours.poll(30):
            raise RuntimeError("the collector did not start within 30 s")
        self.endpoint = f"http://127.0.0.1:{ours.recv()}"
        self._pipe = ours

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()

    def requests(self) -> int:
        """How many it took so far."""
        self._pipe.send("requests")
        return int(self._pipe.recv())


class _Discard(BaseHTTPRequestHandler):
    taken = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        type(self).taken += 1
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def _serve(pipe: Connection) -> None:
    server = HTTPServer(("127.0.0.1", 0), _Discard)
    server.timeout = 0.1
    pipe.send(server.server_port)
    while True:
        server.handle_request()
        if pipe.poll():
            pipe.recv()
            pipe.send(_Discard.taken)
