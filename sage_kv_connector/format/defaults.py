# SPDX-License-Identifier: Apache-2.0
"""Which format a plane takes when only its wire dtype was chosen.

Chosen by scripts/measure_formats.py on KV of SmolLM2-135M, MiniLM and the tests' recall
model; docs/format.md has all figures. On SmolLM2, relative error of attention's output
with only this plane changed, at head_dim 64:

- fp8_e4m3 by token, 8.25 bits an element: K 5.3 %, V 1.6 % (by channel 6.3 and 1.6 %);
- fp8_e5m2 by token, 8.25 bits: K 10.1 %, V 3.2 % (by channel 12.6 and 3.2 %);
- int4 K by channel with a zero point, 4.5 bits: 7.5 % (without 18.2 %, by token 21.4 %);
- int4 V by token with a zero point, 4.5 bits: 7.4 % (without 10.2 %, by channel 11.2 %).
"""

from __future__ import annotations

from sage_kv_connector.contract.dtypes import CAST_DTYPES, WIRE_DTYPES
from sage_kv_connector.format.wire_format import WireFormat

PLANES = ("k", "v", "latent")


def default_format(dtype: str, plane: str) -> WireFormat:
    """The format of ``plane`` ("k", "v" or "latent") for wire dtype ``dtype``.

    Raises ValueError naming the argument, its value and what is allowed.
    """
    if plane not in PLANES:
        raise ValueError(f"plane is {plane!r}, allowed: {', '.join(PLANES)}")
    if dtype not in WIRE_DTYPES:
        raise ValueError(f"dtype is {dtype!r}, allowed: {', '.join(WIRE_DTYPES)}")
    if dtype in CAST_DTYPES:
        return WireFormat(dtype)
    if dtype == "int4":
        return WireFormat("int4", "token" if plane == "v" else "channel", 64, zero_point=True)
    return WireFormat(dtype, "token", 64)
