# SPDX-License-Identifier: Apache-2.0
"""Where routers and decode workers learn a prefill engine's addresses: ``GET /query``.

The answer has the form that vLLM's router asks for when it dispatches to both
servers at once: data parallel rank → engine id and worker addresses by tensor and
pipeline rank. Our decode side reads ``ranks`` and ``node`` beside them.
"""

from __future__ import annotations

import json
import socket
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

MAX_ANSWER_BYTES = 1 << 20


class BootstrapServer:
    """Serves one fixed answer from a thread that sleeps in accept."""

    def __init__(
        self,
        host: str,
        port: int,
        engine_id: str,
        ranks: dict[int, tuple[str, ...]],
        node: str,
        pp_size: int = 1,
    ) -> None:
        answer = {
            "0": {
                "engine_id": engine_id,
                "worker_addr": {
                    str(rank): {"0": next(a for a in reversed(addresses))}
                    for rank, addresses in ranks.items()
                },
                "ranks": {str(rank): list(addresses) for rank, addresses in ranks.items()},
                "node": node,
                "pp_size": pp_size,
            }
        }
        body = json.dumps(answer).encode()

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                found = self.path.rstrip("/") == "/query"
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body) if found else 0))
                self.end_headers()
                if found:
                    self.wfile.write(body)

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


class BootstrapAnswer(NamedTuple):
    """What a prefill engine says of itself."""

    engine_id: str
    ranks: dict[int, tuple[str, ...]]
    node: str
    pp_size: int = 1


def query_bootstrap(url: str, timeout_s: float) -> BootstrapAnswer:
    """Ask ``url``/query. Raises OSError when nobody answers, ValueError when the answer is not ours."""
    with urllib.request.urlopen(f"{url}/query", timeout=timeout_s) as response:
        data = response.read(MAX_ANSWER_BYTES + 1)
    if len(data) > MAX_ANSWER_BYTES:
        raise ValueError(f"{url}/query answered more than {MAX_ANSWER_BYTES} bytes")
    try:
        entry = json.loads(data)["0"]
        ranks = {int(rank): tuple(map(str, addresses)) for rank, addresses in entry["ranks"].items()}
        stages = int(entry.get("pp_size", 1))
        if stages < 1 or len(ranks) % stages:
            raise ValueError(f"pp_size is {stages}, must divide the {len(ranks)} ranks")
        return BootstrapAnswer(str(entry["engine_id"]), ranks, str(entry["node"]), stages)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{url}/query is not answered by a sage_kvt prefill engine: {error!r}") from error
