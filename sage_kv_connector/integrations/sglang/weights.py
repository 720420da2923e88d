# SPDX-License-Identifier: Apache-2.0
"""What the weights of an SGLang server are, said as vLLM's side says it too."""

from __future__ import annotations

import json
from typing import Any

from sage_kv_connector.integrations.common.weight_files import weights_identity


def own_weights() -> str:
    """Of the server that this process belongs to; "" where it belongs to none."""
    from sglang.srt.runtime_context import get_server_args

    try:
        return weights_of(get_server_args())
    except ValueError:  # SGLang's word for "not set"
        return ""


def weights_of(server_args: Any) -> str:
    """Reads a little of each file of the model."""
    overrides = str(getattr(server_args, "json_model_override_args", None) or "{}")
    return weights_identity(
        str(server_args.model_path),
        str(getattr(server_args, "revision", None) or ""),
        str(getattr(server_args, "quantization", None) or ""),
        json.loads(overrides),
        str(getattr(server_args, "load_format", "auto")),
    )
