# SPDX-License-Identifier: Apache-2.0
"""Which format a wire dtype means for K and for V."""

from __future__ import annotations

from sage_kv_connector.format.wire_format import CAST_DTYPES, WireFormat


def default_format(dtype: str, plane: str) -> WireFormat:
    """The format of ``dtype`` for plane ``k``, ``v`` or ``latent``."""
    if dtype in CAST_DTYPES:
        return WireFormat(dtype)
    if dtype == "int4":
        granularity = "channel" if plane != "v" else "token"
        return WireFormat(dtype, granularity, 64, zero_point=True)  # type: ignore[arg-type]
    return WireFormat(dtype, "channel" if plane != "v" else "token")
