# SPDX-License-Identifier: Apache-2.0
"""Our log as one JSON object a line, with the facts of an event as fields of their own."""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from typing import Any, Literal

PACKAGE = "sage_kv_connector"
LogFormat = Literal["text", "json"]
STDERR = 2
#: The attribute of a log record that holds an event's facts.
_FACTS = "sage_kvt_facts"


def facts(event: str, **values: Any) -> dict[str, Any]:
    """For ``extra`` of a logger's call. ``event``: what happened, one of a few words; ``values``: JSON has them."""
    return {_FACTS: {"event": event, **values}}


class JsonFormatter(logging.Formatter):
    """time, level, event, the event's facts, logger, message; exception where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "event": "log",
            **getattr(record, _FACTS, {}),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info and record.exc_info[0] is not None:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said, default=str)


class JsonHandler(logging.Handler):
    """To the process's stderr itself: earlier vLLM writes a process's name before each line of ``sys.stderr``."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            left = memoryview(f"{self.format(record)}\n".encode())
            while left:
                left = left[os.write(STDERR, left) :]
        except Exception:
            self.handleError(record)


def use_log_format(log_format: LogFormat) -> None:
    """With json our loggers write to stderr, and to no handler of the engine. Idempotent; levels stay as they are.

    With text nothing changes: lines go where the engine's go. A process has one format: json, once it is chosen.
    """
    ours = logging.getLogger(PACKAGE)
    if log_format == "text" or any(isinstance(handler, JsonHandler) for handler in ours.handlers):
        return
    ours.addHandler(JsonHandler())
    ours.propagate = False
