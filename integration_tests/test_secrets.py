# SPDX-License-Identifier: Apache-2.0
"""A secret given as an option is in no log, no process list and no environment where the user did not put it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from integration_tests.cluster import PREFILL_PARAMS, new_prompt
from sage_kv_connector.config import SECRET_ENV
from sage_kv_connector.launch.process import running
from sage_kv_connector.launch.vllm import VllmOptions, complete, vllm_server

SECRET = "correcthorsebatterystaple"
GIVEN = {
    "word": f"sage_kvt:host=127.0.0.1,secret={SECRET}",
    "json": json.dumps(
        {
            "kv_connector": "sage_kvt",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"host": "127.0.0.1", "secret": SECRET},
        }
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("form", GIVEN)
def test_only_the_command_that_was_typed_has_it(scratch: Path, model: Path, form: str) -> None:
    options = VllmOptions(
        model,
        scratch,
        2048,
        extra=("--dtype", "float32"),
        env={SECRET_ENV: "", "VLLM_LOGGING_LEVEL": "DEBUG"},
    )
    server = vllm_server(f"secret-{form}", options, GIVEN[form])
    with running(server):
        prompt = new_prompt(300)
        first = complete(server.url, prompt, max_tokens=1, kv_transfer_params=PREFILL_PARAMS, stream=False)
        given = complete(server.url, prompt, max_tokens=4, kv_transfer_params=first.kv_transfer_params)
        assert given.token_ids and server.popen is not None
        shown = {
            (pid, name)
            for pid in server.pids()
            for name in ("cmdline", "environ")
            if SECRET.encode() in Path(f"/proc/{pid}/{name}").read_bytes()
        }
        assert len(server.pids()) > 2 and shown == {(server.popen.pid, "cmdline")}
    log = server.log.read_text()
    assert SECRET not in log and "**********" in log
    assert "sent KV of request" in log or "not needed" in log
