# SPDX-License-Identifier: Apache-2.0
"""What the weights of an SGLang server are, said as vLLM's side says it too, also when they are replaced in place.

An update of weights may name their version (``weight_version``), and ``/update_weight_version`` sets it alone; each
scheduler records it (``record_weight_version_change``) after the new weights are there, before the cache is flushed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from sage_kv_connector.integrations.common.engine_methods import wrap_method
from sage_kv_connector.integrations.common.weight_files import weights_identity

#: What SGLang calls weights that were never given another version.
FIRST_VERSION = "default"
_listeners: list[Callable[[str], None]] = []


def own_version() -> str:
    """The version of this process's weights."""
    from sglang.srt.runtime_context import get_serving

    try:
        return str(get_serving().weight_version)
    except (AttributeError, ValueError):  # a release without versions; a process that is no server's
        return FIRST_VERSION


def own_weights() -> str:
    """Of the server that this process belongs to; "" where it belongs to none."""
    from sglang.srt.runtime_context import get_server_args

    try:
        return weights_of(get_server_args(), own_version())
    except ValueError:  # SGLang's word for "not set"
        return ""


def weights_of(server_args: Any, version: str = FIRST_VERSION) -> str:
    """Reads a little of each file of the model. ``version``: of weights replaced while it runs."""
    overrides = str(getattr(server_args, "json_model_override_args", None) or "{}")
    return weights_identity(
        str(server_args.model_path),
        str(getattr(server_args, "revision", None) or ""),
        str(getattr(server_args, "quantization", None) or ""),
        json.loads(overrides),
        str(getattr(server_args, "load_format", "auto")),
        "" if version == FIRST_VERSION else version,
    )


def follow_weights(replaced: Callable[[str], None]) -> None:
    """Call ``replaced(version)`` on the scheduler's thread when it was told another version."""
    _listeners.append(replaced)
    wrap_method("sglang.srt.managers.scheduler", "Scheduler", "record_weight_version_change", _heard)


def _heard(record: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = own_version()
        result = record(self, *args, **kwargs)
        if (version := own_version()) != before:
            for replaced in _listeners:
                replaced(version)
        return result

    return wrapped
