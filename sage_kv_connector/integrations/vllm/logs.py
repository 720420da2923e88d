# SPDX-License-Identifier: Apache-2.0
"""Our log lines in vLLM's log: same handlers, same format, same level. As JSON they have a handler of their own."""

from __future__ import annotations

import logging

from sage_kv_connector.telemetry.recording.json_lines import PACKAGE, LogFormat, use_log_format


def follow_vllm_logging(log_format: LogFormat) -> None:
    """Give the package's logger vLLM's level, and with text its handlers, unless the user configured it."""
    ours, vllm = logging.getLogger(PACKAGE), logging.getLogger("vllm")
    configured = bool(ours.handlers)
    use_log_format(log_format)
    if configured:
        return
    ours.setLevel(vllm.level or logging.INFO)
    if not ours.handlers:
        for handler in vllm.handlers:
            ours.addHandler(handler)
        ours.propagate = False
