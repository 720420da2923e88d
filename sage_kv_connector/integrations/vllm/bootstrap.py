# SPDX-License-Identifier: Apache-2.0
"""vLLM's bootstrap server: where routers and decode servers of both engines learn a prefill engine's addresses.

Each data parallel rank has an engine and a bootstrap server of its own, on ports that follow each other. A router is
told one port: whoever answers there also answers for the ranks of this node that follow.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from sage_kv_connector.contract.peer import bracket
from sage_kv_connector.integrations.common.bootstrap_answers import (
    DP_ENGINE,
    query_answer,
    query_engines,
    topology_answer,
)
from sage_kv_connector.integrations.common.prefill_ranks import PrefillEngine

#: A sibling on this node answers at once, or is not there.
SIBLING_TIMEOUT_S = 2.0
#: Connections at a time; more are closed at once. Whoever reaches the port may ask.
MAX_ASKERS = 64


class BootstrapServer:
    """Answers from threads; one sleeps in accept.

    SGLang's decode asks ``/route`` about the server and ``/health`` whether it is still there. ``dp_rank``: the
    engine's data parallel rank.
    """

    def __init__(self, host: str, port: int, engine: PrefillEngine, dp_rank: int = 0) -> None:
        self._dp_rank = dp_rank
        self._engines = {dp_rank: engine}
        answers: dict[str, Callable[[], bytes]] = {
            "/query": lambda: json.dumps(query_answer(self._all_engines())).encode(),
            "/own/query": lambda: json.dumps(query_answer({dp_rank: self._engines[dp_rank]})).encode(),
            "/route": lambda: json.dumps(topology_answer(self._engines[dp_rank])).encode(),
            "/health": lambda: b'"OK"',
        }

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                answer = answers.get(urlsplit(self.path).path.rstrip("/"))
                body = answer() if answer is not None else b""
                self.send_response(200 if answer is not None else 404)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
            daemon_threads = True
            request_queue_size = MAX_ASKERS  # a crowd that comes at once is not kept waiting by the kernel
            places = threading.BoundedSemaphore(MAX_ASKERS)

            def process_request(self, request: Any, client_address: Any) -> None:
                if not self.places.acquire(blocking=False):
                    self.shutdown_request(request)
                    return
                try:
                    super().process_request(request, client_address)
                except RuntimeError:  # no thread for it
                    self.places.release()
                    raise

            def process_request_thread(self, request: Any, client_address: Any) -> None:
                try:
                    super().process_request_thread(request, client_address)
                finally:
                    self.places.release()

        self._server = Server((host, port), Handler)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(3600.0,), name="sage-kvt-bootstrap", daemon=True
        )
        self._thread.start()

    def describe(self, engine: PrefillEngine) -> None:
        """What is answered of this engine from now on."""
        self._engines[self._dp_rank] = engine

    def _all_engines(self) -> dict[int, PrefillEngine]:
        """With those of the siblings on this node that follow; they may start later than this one."""
        last = max(self._engines)
        own_id = self._engines[min(self._engines)].ranks[0].engine_id
        named = DP_ENGINE.search(own_id)
        while named is not None:
            # Ports that are chosen by the system do not follow each other; nobody answers there then, or another one.
            url = f"http://{bracket(self._reached_at)}:{self.port + last + 1 - min(self._engines)}/own"
            try:
                found = query_engines(url, SIBLING_TIMEOUT_S).get(last + 1)
            except (OSError, ValueError):
                break
            if found is None or found.ranks[0].engine_id != f"{own_id[: named.start()]}_dp{last + 1}":
                break
            self._engines[last + 1] = found
            last += 1
        return dict(self._engines)

    @property
    def _reached_at(self) -> str:
        """The address at which this machine reaches itself."""
        host = str(self._server.server_address[0])
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)

    def close(self) -> None:
        # serve_forever sleeps in a selector; a connection wakes it so that it sees the shutdown.
        stopper = threading.Thread(target=self._server.shutdown, daemon=True)
        stopper.start()
        try:
            socket.create_connection((self._reached_at, self.port), timeout=1).close()
        except OSError:
            pass
        stopper.join(timeout=2)
        self._server.server_close()
