# SPDX-License-Identifier: Apache-2.0
"""Our log lines in vLLM's log: same handlers, same format, same level."""

from __future__ import annotations

import logging


def follow_vllm_logging() -> None:
    """Give the package's logger vLLM's handlers unless the user configured it."""
    ours, vllm = logging.getLogger("sage_kv_connector"), logging.getLogger("vllm")
    if not ours.handlers:
        for handler in vllm.handlers:
            ours.addHandler(handler)
        ours.setLevel(vllm.level or logging.INFO)
        ours.propagate = False
