# SPDX-License-Identifier: Apache-2.0
"""Prompts whose answer hangs on how numbers are rounded, told by a server's own log-probabilities."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from sage_kv_connector.launch.process import ServerError
from sage_kv_connector.launch.vllm import judged

STEPS = [{"token_id:1": -0.5, "token_id:2": -3.0}, {"token_id:7": -1.25, "token_id:1": -1.0}]


@pytest.fixture
def url() -> Iterator[str]:
    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200 if asked["prompt"] else 400)
            self.end_headers()
            answer = {"choices": [{"token_ids": [1, 1], "logprobs": {"top_logprobs": STEPS}}]}
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_it_is_the_least_lead_of_a_step(url: str) -> None:
    assert judged(url, [1, 2], 2) == ([1, 1], 0.25)


def test_an_answer_that_is_none_is_an_error(url: str) -> None:
    with pytest.raises(ServerError, match="answered 400"):
        judged(url, [], 2)
