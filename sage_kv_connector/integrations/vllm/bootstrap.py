# SPDX-License-Identifier: Apache-2.0
"""vLLM's bootstrap server: where routers and decode servers of both engines learn a prefill engine's addresses."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from sage_kv_connector.integrations.common.bootstrap_answers import query_answer, topology_answer
from sage_kv_connector.integrations.common.prefill_ranks import PrefillEngine


class BootstrapServer:
    """Serves fixed answers from a thread that sleeps in accept.

    SGLang's decode asks ``/route`` about the server and ``/health`` whether it is still there.
    """

    def __init__(self, host: str, port: int, engine: PrefillEngine) -> None:
        answers = {
            "/query": json.dumps(query_answer({0: engine})).encode(),
            "/route": json.dumps(topology_answer(engine)).encode(),
            "/health": b'"OK"',
        }

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                body = answers.get(urlsplit(self.path).path.rstrip("/"))
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
            daemon_threads = True

        self._server = Server((host, port), Handler)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(3600.0,), name="sage-kvt-bootstrap", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        # serve_forever sleeps in a selector; a connection wakes it so that it sees the shutdown.
        stopper = threading.Thread(target=self._server.shutdown, daemon=True)
        stopper.start()
        try:
            host = self._server.server_address[0]
            target = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(str(host), str(host))
            socket.create_connection((target, self.port), timeout=1).close()
        except OSError:
            pass
        stopper.join(timeout=2)
        self._server.server_close()
