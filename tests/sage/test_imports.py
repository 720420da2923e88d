# SPDX-License-Identifier: Apache-2.0
"""Imports stay cheap: no engine, no torch, no SAGE package comes with the package itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "vllm",
    "sglang",
    "sagellm",
    "sagellm_comm",
    "sagellm_protocol",
    "sagellm_core",
    "sage",
    "triton",
)


@pytest.mark.parametrize(
    "modules",
    [
        "sage_kv_connector",
        "sage_kv_connector.config, sage_kv_connector.engine.transport, sage_kv_connector.cli.main",
        "sage_kv_connector.cli.sage_app, sage_kv_connector.integrations.sage.point_to_point",
        "sage_kv_connector.integrations.sage.inference_backend, sage_kv_connector.cli.sage_serve",
    ],
)
def test_imports_load_no_engine(modules: str) -> None:
    program = f"import {modules}, sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
